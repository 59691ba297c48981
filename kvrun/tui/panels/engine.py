"""The engine beside the columns: speed, batch, queue, the map of the KV cache, adapters."""

from itertools import groupby

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from kvrun.chat.printable import printable
from kvrun.runtime.engine.request import Pages
from kvrun.tui.board import Board
from kvrun.tui.pages import CACHED, FREE, SHARED, Cell, PageMap, page_map
from kvrun.tui.pulse import Pulse, bar, sparkline

COLORS = (
    "ansi_bright_cyan", "ansi_bright_yellow", "ansi_bright_green", "ansi_bright_magenta",
    "ansi_bright_red", "ansi_bright_blue", "ansi_white", "ansi_cyan",
)  # fmt: skip
MAP_ROWS = 6


def color(place: int) -> str:
    """The colour of a column's number; after the last the first comes again."""
    return COLORS[(place - 1) % len(COLORS)]


class EnginePanel(VerticalScroll, can_focus=False):
    """Shows a Pulse and a map of pages; `solo` is what the last comparison has said."""

    def __init__(self, board: Board, pulse: Pulse) -> None:
        super().__init__(id="engine")
        self.border_title = "engine (F2)"
        self._board = board
        self._pulse = pulse
        self._pages: Pages | None = None
        self.solo = ""
        self._lines = 0

    def compose(self) -> ComposeResult:
        yield Static(id="engine-text", markup=False)

    def take(self, pages: Pages | None) -> None:
        """Take in the pages of a moment, and show it."""
        self._pages = pages
        width = max(20, self.content_size.width)
        text = self.text(width)
        lines = text.plain.count("\n")
        self.query_one("#engine-text", Static).update(text, layout=lines != self._lines)
        self._lines = lines

    def text(self, width: int) -> Content:
        """Everything, for a panel `width` cells wide."""
        host = self._board.host
        if host is None:
            return Content("the columns ask a server;\nits counters are not here")
        if not host.ready:
            return Content(printable(str(host.failure)) if host.failure else "starting …")
        lines = [*self._counters(width), *self._map(width), Content(""), *self._adapters(width)]
        if self.solo:
            lines += [Content(""), *(Content(line) for line in self.solo.splitlines())]
        return Content("\n").join(lines)

    def _counters(self, width: int) -> list[Content]:
        pulse, now = self._pulse, self._pulse.now
        streaming = sum(talk.busy for talk in self._board.talks)
        most = max(8, len(self._board.talks))
        share = pulse.prefill_share
        hits = pulse.hit_rate
        lines = [
            f"throughput {pulse.rate('generated_tokens'):8.1f} tok/s",
            sparkline(pulse.speeds(width), width),
            f"steps {pulse.rate('steps'):5.1f}/s   total {now.steps:,}",
            f"batch {bar(now.running / most, 8)} {now.running}   queue {now.waiting}",
        ]
        if share is None:
            lines.append("prefill –   decode –")
        else:
            lines.append(f"prefill {share:4.0%} {bar(1 - share, 6)} decode {1 - share:4.0%}")
        lines.append("prefix hits " + ("–" if hits is None else f"{hits:.0%}"))
        # The line stays when it has nothing to say, so that those below do not move.
        lines.append(f"{streaming} columns in one batch" if streaming > 1 else "")
        return [Content(line) for line in lines]

    def _map(self, width: int) -> list[Content]:
        if self._pages is None:
            return []
        places = {
            talk.request_id: number
            for number, talk in enumerate(self._board.talks, 1)
            if talk.request_id
        }
        found = page_map(self._pages, places, width * MAP_ROWS)
        used = found.used / found.total if found.total else 0.0
        head = f"KV pages {found.used:,}/{found.total:,} ({used:.1%})"
        scale = f"1 cell = {found.scale} pages" if found.scale > 1 else ""
        lines = [Content(head), *_rows(found, width)]
        key = f"{SHARED} shared {found.shared} {CACHED} cached {found.cached} {FREE} free"
        lines.append(Content(key))
        return [*lines, Content(scale)] if scale else lines

    def _adapters(self, width: int) -> list[Content]:
        assert self._board.host
        adapters = self._board.host.adapters.values()
        if not adapters:
            return [Content("no adapter is resident")]
        lines = [Content("adapters resident")]
        for info in adapters:
            ranks = "/".join(map(str, sorted(set(info.ranks))))
            size = f"{info.bytes / 1e6:.1f} MB" if info.bytes else ""
            took = f"{info.load_seconds * 1000:.0f} ms" if info.load_seconds else ""
            mark = "●" if info.running else "○"
            line = f"{mark} {info.name} r{ranks} {size} {took}".rstrip()
            lines.append(Content(printable(line)[:width]))
        return lines


def _rows(found: PageMap, width: int) -> list[Content]:
    cells = found.cells
    rows = []
    for start in range(0, len(cells), width):
        runs = groupby(cells[start : start + width], key=_style)
        parts = [("".join(cell.mark for cell in run), style) for style, run in runs]
        rows.append(Content.assemble(*parts))
    return rows


def _style(cell: Cell) -> str:
    if cell.place:
        return color(cell.place)
    return "dim" if cell.mark == FREE else ""
