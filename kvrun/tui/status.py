"""The line at the top: which model, how many columns, how fast, how full."""

from textual.widgets import Static

from kvrun.chat.printable import printable
from kvrun.tui.board import Board
from kvrun.tui.pulse import Pulse


def status(board: Board, pulse: Pulse, hidden: int, width: int) -> str:
    """What fits into `width` cells of it; the name and the speed go last."""
    host = board.host
    if host is None:
        return f"kvrun  {printable(board.talks[0].source.name)}  ·  {columns(board, hidden)}"[
            :width
        ]
    name = printable(host.name)
    if host.failure:
        return f"kvrun  {name}  ·  the engine has ended  ·  F9 restarts"[:width]
    if not host.ready:
        return f"kvrun  {name}  ·  the engine starts …"[:width]
    ready, now = host.session.engine, pulse.now
    used = now.blocks_active / now.blocks_total if now.blocks_total else 0.0
    parts = [
        f"kvrun  {name}",
        f"{pulse.rate('generated_tokens'):.1f} tok/s",
        columns(board, hidden),
        f"batch {now.running}  queue {now.waiting}",
        f"KV {used:.0%}" if used >= 0.1 or not used else f"KV {used:.1%}",
        f"{ready.dtype} on {ready.device}",
    ]
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 5 + len(part) <= width:
            line += f"  ·  {part}"
    return line


def columns(board: Board, hidden: int) -> str:
    """How many there are, which of them the prompt reaches, and how many are out of sight."""
    count, linked = len(board.talks), sum(talk.linked for talk in board.talks)
    text = "1 column" if count == 1 else f"{count} columns"
    if linked != count:
        text += f", {linked} linked"
    return text + (f", {hidden} out of sight" if hidden else "")


class Status(Static):
    """Shows `status`; repainted only when it has changed."""

    def __init__(self) -> None:
        super().__init__("", id="status", markup=False)
        self._line = ""

    def show(self, line: str) -> None:
        if line != self._line:
            self._line = line
            self.update(line)
