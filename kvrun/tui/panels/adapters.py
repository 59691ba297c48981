"""Adapters: load from a folder or the Hub, unload, scale, while columns go on streaming."""

from collections.abc import Coroutine, Mapping
from typing import Any, ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.widgets import Input

from kvrun.errors import InvalidRequest, KvrunError, NotFound
from kvrun.hub.local import resolve_adapter
from kvrun.runtime.engine.request import AdapterInfo
from kvrun.tui.board import Board
from kvrun.tui.panels.picker import Picker, Row
from kvrun.tui.pulling import pull
from kvrun.tui.talk import Speaker

MOST_SCALE = 10.0


def facts(info: AdapterInfo, columns: list[str]) -> str:
    """What is known of an adapter: ranks, size, how long it took to load, who uses it."""
    parts = ["r" + "/".join(map(str, sorted(set(info.ranks))))] if info.ranks else []
    if info.bytes:
        parts.append(f"{info.bytes / 1e6:.1f} MB")
    if info.load_seconds:
        parts.append(f"loaded in {info.load_seconds * 1000:.0f} ms")
    if info.state:
        parts.append(info.state)
    if info.running:
        parts.append(f"{info.running} running")
    if columns:
        parts.append(f"column {', '.join(columns)}")
    return " · ".join([*parts, info.error] if info.error else parts)


class AdaptersScreen(Picker):
    """`offered` are adapters that lie at hand, by name; a path in the line loads any other."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+d", "unload", "Unload", id="adapters.unload", priority=True),
    ]

    def __init__(self, board: Board, offered: Mapping[str, str]) -> None:
        hint = "FOLDER, ORG/NAME or NAME=FOLDER loads · a number scales the adapter below"
        super().__init__("adapters", [], hint=hint, free=True)
        self._board = board
        self._offered = dict(offered)

    def keys(self) -> str:
        return "enter load · ^d unload · a number, then enter: scale · ↑↓ move · esc close"

    def begin(self) -> None:
        self.refresh_rows()

    def refresh_rows(self) -> None:
        """Show what is resident, then what can be."""
        host = self._board.host
        assert host
        rows = []
        for name, info in host.adapters.items():
            users = [
                f"{number}" + (f" ×{talk.speaker.scale:g}" if talk.speaker.scale != 1 else "")
                for number, talk in enumerate(self._board.talks, 1)
                if talk.speaker.adapter == name and self._board.local(talk)
            ]
            mark = "●" if info.running else "○"
            rows.append(Row(name, f"{mark} {name}", facts(info, users)))
        for name, path in self._offered.items():
            if name not in host.adapters:
                rows.append(Row(name, f"  {name}", f"not loaded · {path}"))
        self.fill(rows)

    @on(Input.Changed)
    def typed(self, event: Input.Changed) -> None:
        """The line is no filter here."""
        event.prevent_default()
        if event.value:  # the line is emptied when its wish has been heard
            self.say("")

    @on(Input.Submitted)
    def entered(self, event: Input.Submitted) -> None:
        """Load what the line or the row names, or scale the adapter of the row."""
        event.prevent_default()
        text = event.value.strip()
        key = self.highlighted
        host = self._board.host
        if not text and key and host and key not in host.adapters:
            self._try(self._load(key, self._offered[key]))
        elif text and _number(text) is not None and key:
            self._try(self._scale(key, _number(text) or 0.0))
        elif text:
            name, equals, path = text.partition("=")
            self._try(self._load(name if equals else "", path if equals else text))
        event.input.value = ""

    def chosen(self, key: str) -> None:
        """A click loads, too."""
        if self._board.host and key not in self._board.host.adapters and key in self._offered:
            self._try(self._load(key, self._offered[key]))

    def action_unload(self) -> None:
        """Let go of the adapter of the row."""
        if key := self.highlighted:
            self._try(self._unload(key))

    def _try(self, work: Coroutine[Any, Any, str]) -> None:
        async def run() -> None:
            try:
                said = await work
            except KvrunError as error:
                said = str(error)
            if self.is_attached:
                self.refresh_rows()
                self.say(said)

        self.run_worker(run(), exit_on_error=False)

    async def _load(self, name: str, path: str) -> str:
        assert self._board.host
        try:
            folder = resolve_adapter(self._board.host.name, path)
        except NotFound:
            if not await pull(path, lambda text: self.say(text) if self.is_attached else None):
                raise
            folder = resolve_adapter(self._board.host.name, path)
        name = name or (path if path in self._offered else folder.name)
        info = await self._board.host.load_adapter(name, str(folder))
        took = f" in {info.load_seconds * 1000:.0f} ms" if info.load_seconds else ""
        return f"'{name}' is loaded{took}; + makes a column for it"

    async def _unload(self, name: str) -> str:
        assert self._board.host
        used = [t for t in self._board.talks if t.speaker.adapter == name and t.busy]
        if used:
            raise InvalidRequest(f"a column still answers with '{name}'.", hint="stop it first")
        await self._board.host.unload_adapter(name)
        return f"'{name}' is no longer resident"

    async def _scale(self, name: str, scale: float) -> str:
        if not 0 <= scale <= MOST_SCALE:
            raise InvalidRequest(f"a scale is {scale:g}; it must be 0 to {MOST_SCALE:g}.")
        talks = [t for t in self._board.talks if t.speaker.adapter == name]
        for talk in talks:
            talk.speaker = Speaker(name, scale)
        return f"×{scale:g} in {len(talks)} columns, from the next answer on"


def _number(text: str) -> float | None:
    try:
        return float(text.removeprefix("×"))
    except ValueError:
        return None
