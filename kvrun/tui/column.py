"""Column: one conversation on the screen, its keys, and what it says of itself in its border."""

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import BindingType
from textual.content import Content
from textual.geometry import Region, Size
from textual.message import Message as Event
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

from kvrun.chat.blocks import code_blocks
from kvrun.chat.conversation import Message
from kvrun.chat.printable import printable
from kvrun.errors import KvrunError
from kvrun.tui.entry import GUTTER, Answer, Entry, Growing, Ink, Note, Question
from kvrun.tui.keys import COLUMN
from kvrun.tui.talk import Talk

SCROLLED = 4  # lines at a time while an answer comes
BORDER = 4  # ticks between two looks at its counts
COLORS = 8  # places with a colour of their own
SHOWN = 50  # messages on the screen; earlier ones come when they are asked for


class Column(ScrollView, can_focus=True):
    """Shows a Talk. `number` is its place, from 1; it names the column everywhere.

    Lines are made once and kept, and the widget has no children: what a frame costs depends on
    how many lines are seen, not on how many there are.
    """

    BINDINGS: ClassVar[list[BindingType]] = [*COLUMN]
    HELP = "One conversation. Its keys work while it has the focus; Tab goes there and back."

    @dataclass
    class Focused(Event):
        """The user looks at this column now."""

        column: "Column"

    @dataclass
    class Edit(Event):
        """A question shall be asked in other words."""

        talk: Talk
        message: Message

    def __init__(self, talk: Talk, number: int) -> None:
        super().__init__(id=f"column-{id(talk)}", classes="column")
        self.talk = talk
        self.number = number
        self._shown: list[Entry] = []  # one for each message, in the order of the branch
        self._conversation = talk.conversation
        self._notes: list[Note] = []
        self._live: Growing | None = None
        self._turn = 0  # which answer of the talk that is
        self._said: object = None  # the error that stands below
        self._selected: int | None = None  # a message's id
        self._from: int | None = None  # messages before this are not on the screen
        self._next_code = 0
        self._ticks = 0
        self._drawn: list[Strip] = []  # the lines of the answer that comes, as they were last
        self._head = ("", "")
        self._ink: Ink | None = None
        self._laid_out: Size | None = None  # the size for which the lines were made
        self._at_end = True
        self._starts: list[int] = []  # the first line of each entry
        self._entries: list[Entry] = []
        self._ready: dict[
            int, tuple[Strip, str, object, Strip]
        ] = {}  # lines as they were last shown

    def on_mount(self) -> None:
        self.border_title = ""
        self.renumber(self.number)
        self.sync()

    def on_focus(self) -> None:
        self.post_message(self.Focused(self))

    def renumber(self, number: int) -> None:
        """Take a place, and the colour that the map of pages has for it."""
        self.remove_class(f"-place-{(self.number - 1) % COLORS + 1}")
        self.add_class(f"-place-{(number - 1) % COLORS + 1}")
        self.number = number
        self.head()

    def head(self) -> None:
        """Write the border: who answers, whether the prompt goes there, counts and times."""
        talk = self.talk
        alone = "" if talk.linked else " ⊘"
        words = (printable(f"{self.number} {talk.label}{alone}"), talk.line(self.size.width))
        if words != self._head:
            self._head = words
            self.border_title, self.border_subtitle = map(Content, words)

    # -- lines ------------------------------------------------------------------------------

    def on_resize(self) -> None:
        self.flow()
        self.head()

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._ready.clear()
        if self.is_mounted:
            self.flow()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if self.size == self._laid_out:  # else the scrolling is that of a resize
            self._at_end = new_value >= self.max_scroll_y - 1

    def flow(self) -> None:
        """Lay the entries out anew; who was at the end stays there."""
        width = self.scrollable_content_region.width
        if not width:
            return
        at_end, self._laid_out = self._at_end, None
        dark = self.app.current_theme.dark
        self._ink = Ink(width - GUTTER, self.rich_style, dark)
        live = [self._live] if self._live is not None else []
        self._entries = [*self._shown, *live, *self._notes]
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

    def _grow(self) -> None:
        """Draw the lines that are new in the answer that comes.

        When it reaches the end of what is seen, several lines are scrolled at once: each time
        everything has to be drawn.
        """
        ink, live = self._ink, self._live
        if ink is None or live is None or self._entries[-1:] != [live]:
            self.flow()
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
        self.set_reactive(Column.virtual_size, size)
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

    # -- the branch on the screen -------------------------------------------------------------

    def tick(self) -> None:
        """Show what has come since the last tick."""
        talk = self.talk
        if talk.conversation is not self._conversation:
            self.rebuild()  # its messages have the numbers of others
        if self._live is not None and self._turn != talk.turn:
            self._live = None  # it has ended and another one has begun between two ticks
        if talk.busy or self._live is not None:
            self._stream()
            # A border that changes draws the whole column.
            self._ticks += 1
            if not talk.busy or self._ticks % BORDER == 1:
                self.head()
        if [m.id for m in talk.conversation.branch()[self._from or 0 :]] != self._ids():
            self.sync()
        if talk.error is not self._said:
            self._said = talk.error
            if talk.error is not None:
                self.say(f"{talk.error}\nr asks again", error=True)

    def _ids(self) -> list[int]:
        return [entry.message.id for entry in self._shown if entry.message]

    def _stream(self) -> None:
        talk = self.talk
        began = self._live is None
        if self._live is None:
            self.sync()
            self._live, self._turn = Growing(), talk.turn
        text = talk.take()
        if text:
            self._live.grow(text)
        if not talk.busy:
            live, self._live = self._live, None
            answer = talk.last_answer if talk.reply is not None and talk.reply.text else None
            if answer is not None and answer.id == talk.conversation.head:
                live.finish(answer, self._versions(answer))
                self._shown.append(live)
            self.sync()
            self.flow()
        elif began:
            self._drawn = []
            self._at_end = True
            self.flow()
        elif text:
            self._grow()

    def sync(self) -> None:
        """Make the entries those of the current branch; what has not changed stays."""
        branch = self.talk.conversation.branch()
        if self._from is None or self._from > len(branch):
            self._from = max(0, len(branch) - SHOWN) or None
        wanted = branch[self._from or 0 :]
        known = {e.message.id: e for e in self._shown if e.message is not None}
        before = self._ids()
        self._shown = [known.get(message.id) or self._entry(message) for message in wanted]
        if before != self._ids():
            self._notes.clear()
            self.flow()
        self.head()

    def _entry(self, message: Message) -> Entry:
        which = self._versions(message)
        return Question(message, which) if message.role == "user" else Answer(message, which)

    def _versions(self, message: Message) -> str:
        """Like "2/3" for the second of three; nothing for the only one."""
        ids = [m.id for m in self.talk.conversation.siblings(message.id)]
        return f"{ids.index(message.id) + 1}/{len(ids)}" if len(ids) > 1 else ""

    def rebuild(self) -> None:
        """Show the conversation anew: it has become another one."""
        self._conversation = self.talk.conversation
        self._live = None
        self._shown.clear()
        self._notes.clear()
        self._from = self._selected = None
        self.sync()
        self.flow()
        self.scroll_end(animate=False)

    def say(self, text: str, *, error: bool = False) -> None:
        """A note below; it goes when the conversation goes on."""
        self._notes.append(Note(text, error=error))
        self.flow()
        self.scroll_end(animate=False)

    # -- one of its messages --------------------------------------------------------------------

    @property
    def selected(self) -> Message | None:
        """The message that the keys mean: the one that was chosen, else the last answer."""
        for entry in self._shown:
            if entry.message is not None and entry.message.id == self._selected:
                return entry.message
        return self.talk.last_answer or self.talk.last_question

    def action_select(self, step: int) -> None:
        """Choose the message above or below."""
        ids = self._ids()
        if not ids:
            return
        place = ids.index(self._selected) + step if self._selected in ids else len(ids) - 1
        self._choose(ids[min(max(place, 0), len(ids) - 1)])

    def action_first(self) -> None:
        """Go to the beginning; earlier messages that are not shown come back."""
        if self._from:
            self._from = 0
            self._shown.clear()
            self.sync()
        if ids := self._ids():
            self._choose(ids[0])
        self.scroll_home(animate=False)

    def action_last(self) -> None:
        """Go to the end and stay there."""
        self._choose(None)
        self.scroll_end(animate=False)

    def _choose(self, message_id: int | None) -> None:
        self._selected = message_id
        self._next_code = 0
        for place, entry in enumerate(self._shown):
            if entry.message is not None and entry.message.id == message_id:
                assert self._ink
                height = len(entry.lines(self._ink))
                region = Region(0, self._starts[place], 1, min(height, self.size.height))
                self.scroll_to_region(region, animate=False)
        self.refresh()

    # -- keys -----------------------------------------------------------------------------------

    def action_edit(self) -> None:
        """Put a question back into the prompt; it is asked on a branch of its own."""
        message = self.selected
        if message is None or message.role != "user":
            message = self.talk.last_question
        if message is None:
            self.notify("there is no question to edit")
        else:
            self.post_message(self.Edit(self.talk, message))

    def action_again(self) -> None:
        """Have the last question answered again."""
        self.guarded(self.talk.again)

    def action_branch(self, step: int) -> None:
        """Show another version of the chosen message, or of the last that has any."""
        chosen = self.selected.id if self._selected is not None and self.selected else None
        self.guarded(lambda: self._branch(step, chosen))

    def _branch(self, step: int, chosen: int | None) -> None:
        if not self.talk.switch(step, chosen):
            self.notify("there is no other version; e or r make one")
        self._choose(None)

    def guarded(self, change: Callable[[], None]) -> None:
        """Change the conversation, unless an answer comes into it."""
        if self.talk.busy:
            self.notify("this column still answers; x stops it")
            return
        try:
            change()
        except KvrunError as error:
            self.notify(str(error), severity="error", markup=False)
        self.tick()

    def action_stop(self) -> None:
        """End the answer of this column."""
        self.talk.stop()

    def action_copy(self) -> None:
        """Copy the chosen message, else the last answer."""
        if message := self.selected:
            self._copy(message.content, "the message")

    def action_copy_code(self) -> None:
        """Copy a code block of that message; the next one when pressed again."""
        blocks = code_blocks(self.selected.content) if self.selected else []
        if not blocks:
            self.notify("the message has no code block")
            return
        place = self._next_code % len(blocks)
        self._next_code += 1
        self._copy(blocks[place], f"code block {place + 1} of {len(blocks)}")

    def _copy(self, text: str, what: str) -> None:
        self.app.copy_to_clipboard(printable(text))
        self.notify(f"{what} is copied, if the terminal allows it; ^s writes a file")

    def action_facts(self) -> None:
        """Say everything that is known of the chosen message."""
        if message := self.selected:
            facts = [f"{name.replace('_', ' ')}: {value}" for name, value in message.meta.items()]
            self.say(
                "\n".join([f"message {message.id}, {len(message.content)} characters", *facts])
            )
