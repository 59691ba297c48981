"""Sheet: entries below each other, as lines that are made once and drawn when they change."""

from bisect import bisect

from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

from kvrun.tui.entry import GUTTER, Entry, Ink, Question

SCROLLED = 4  # lines at a time while an answer comes


class Sheet(ScrollView, can_focus=True):
    """What a frame costs depends on how many lines are seen, not on how many there are."""

    def __init__(self, *, id: str, classes: str) -> None:
        super().__init__(id=id, classes=classes)
        self._entries: list[Entry] = []
        self._starts: list[int] = []  # the first line of each entry
        self._ink: Ink | None = None
        self._laid_out: Size | None = None  # the size for which the lines were made
        self._at_end = True
        self._drawn: list[Strip] = []  # the lines of a growing entry, as they were last
        self._ready: dict[int, tuple[Strip, str, object, Strip]] = {}  # lines as last shown
        self._selected: int | None = None  # a message's id

    def on_resize(self) -> None:
        self.lay_out(self._entries)

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._ready.clear()
        if self.is_mounted:
            self.lay_out(self._entries)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        at_end = new_value >= self.max_scroll_y - 1
        # Before its lines are made a resize may scroll too, but never away from the end.
        if self.size == self._laid_out or not at_end:
            self._at_end = at_end

    def lay_out(self, entries: list[Entry]) -> None:
        """Show these entries; who was at the end stays there."""
        self._entries = entries
        width = self.scrollable_content_region.width
        if not width:
            return
        at_end, self._laid_out = self._at_end, None
        dark = self.app.current_theme.dark
        self._ink = Ink(width - GUTTER, self.rich_style, dark)
        self._starts, line = [], 0
        for entry in self._entries:
            self._starts.append(line)
            gap = 0 if isinstance(entry, Question) else 1
            line += len(entry.lines(self._ink)) + gap
        self._measure(Size(width, max(0, line - 1)))
        self._at_end, self._laid_out = at_end, self.size
        if at_end:
            self.scroll_end(animate=False, immediate=True)
        self.refresh()

    def grow(self, live: Entry) -> None:
        """Draw the lines that are new in the last entry.

        When it reaches the end of what is seen, several lines are scrolled at once: each time
        everything has to be drawn.
        """
        ink = self._ink
        if ink is None or not self._entries or self._entries[-1] is not live:
            return
        before, lines = self._drawn, live.lines(ink)
        self._drawn = lines
        pairs = enumerate(zip(before, lines, strict=False))
        first = next((n for n, (old, new) in pairs if old is not new), min(len(before), len(lines)))
        end = self._starts[-1] + len(lines)
        height = -(-end // SCROLLED) * SCROLLED if end > self.size.height else end
        self._measure(Size(ink.width + GUTTER, height))
        if self._at_end:
            self.scroll_end(animate=False, immediate=True)
        top = self._starts[-1] + first - self.scroll_offset.y
        rows = max(len(before), len(lines)) - first
        region = Region(0, top, ink.width + GUTTER, rows).intersection(self.size.region)
        if region:
            self.refresh(region)

    def _measure(self, size: Size) -> None:
        """Take a height. Setting `virtual_size` would lay the whole screen out, at every tick.

        That is only needed when a scroll bar comes or goes, and this one is always there.
        """
        if size == self.virtual_size:
            return
        self.set_reactive(Sheet.virtual_size, size)
        self.vertical_scrollbar.window_virtual_size = size.height
        self.vertical_scrollbar.window_size = self.size.height

    def render_line(self, y: int) -> Strip:
        """One line of what is seen."""
        ink = self._ink
        if ink is None:
            return Strip.blank(self.size.width, self.rich_style)
        line = self.scroll_offset.y + y
        place = bisect(self._starts, line) - 1
        at = line - self._starts[place] if place >= 0 else 0
        lines = self._entries[place].lines(ink) if place >= 0 else []
        width = ink.width + GUTTER
        if at >= len(lines):
            return Strip.blank(width, ink.style)
        entry = self._entries[place]
        chosen = entry.message is not None and entry.message.id == self._selected
        mark = "▌" if chosen else entry.mark(at)
        span = self.text_selection.get_span(line) if self.text_selection else None
        known = self._ready.get(line)
        if known is None or known[0] is not lines[at] or known[1:3] != (mark, span):
            made = self._finished(lines[at], mark, ink, line, span)
            known = self._ready[line] = (lines[at], mark, span, made)
        return known[3]

    def _finished(
        self, strip: Strip, mark: str, ink: Ink, line: int, span: tuple[int, int] | None
    ) -> Strip:
        made = Strip.join([Strip([Segment(mark.ljust(GUTTER), ink.style)]), strip])
        made = made.crop_extend(0, ink.width + GUTTER, ink.style)
        if span is not None:
            start, end = span
            style = self.screen.get_component_rich_style("screen--selection")
            parts = made.divide([start, made.cell_length if end == -1 else end, made.cell_length])
            marked = [Segment(s.text, (s.style or Style()) + style) for s in parts[1]]
            made = Strip.join([parts[0], Strip(marked), *parts[2:]])
        return made.simplify().apply_offsets(0, line)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text under the mouse's selection."""
        if self._ink is None:
            return None
        lines = []
        for entry in self._entries:
            made = entry.lines(self._ink)
            lines += [entry.mark(n).ljust(GUTTER) + strip.text for n, strip in enumerate(made)]
            if not isinstance(entry, Question):
                lines.append("")
        return selection.extract("\n".join(lines)), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        self.refresh()
