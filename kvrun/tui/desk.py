"""Desk: columns, prompt and status, their one tick, what a question or a command does."""

import asyncio
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import ClassVar

from textual import events, on
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import BindingType
from textual.containers import Horizontal
from textual.content import Content
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer, Static

from kvrun.chat.commands import Effect, find, run
from kvrun.chat.conversation import Message
from kvrun.chat.history import History
from kvrun.chat.lines import is_command, unquoted
from kvrun.chat.printable import printable
from kvrun.chat.session import BYTES_PER_TOKEN
from kvrun.errors import InvalidRequest, KvrunError
from kvrun.tui.board import Board
from kvrun.tui.column import Column
from kvrun.tui.columns import Columns
from kvrun.tui.demo import Demo
from kvrun.tui.keys import APP, COLUMNS
from kvrun.tui.panels.engine import EnginePanel
from kvrun.tui.prompt import Prompt
from kvrun.tui.pulse import Pulse
from kvrun.tui.status import Status, status
from kvrun.tui.talk import Speaker, Talk
from kvrun.tui.themes import HIGH_CONTRAST, Themes

TICK = 0.12  # seconds between two looks at a column
PHASES = 4  # of a tick; one more is for everything but the columns
HOLD, MOST_HELD = 0.04, 2  # seconds, and ticks, that columns wait for a key to be shown
SAMPLES = 3  # ticks between two looks at the engine's counters
SMALL = (40, 12)  # cells below which nothing is worth showing
MOST_PASTE = 4_000_000  # characters, whatever the model
ACTIONS = {binding.action for binding in APP}
LOCAL = ("adapter", "stats", "system", "save")  # commands that need the engine's session
WELCOME = "Type a question; every column answers it. Tab goes to the columns, F1 shows all keys."


class Desk(App[KvrunError | None]):
    """Ends with the error that has kept the engine from starting, or with None."""

    CSS_PATH = "style.tcss"
    TITLE = "kvrun"
    BINDINGS: ClassVar[list[BindingType]] = [*APP]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (90, "-mid"), (130, "-wide")]  # noqa: RUF012

    def __init__(
        self,
        board: Board,
        *,
        history: History,
        themes: Themes,
        demo: bool = False,
        resume: bool = False,
        no_color: bool = False,
    ) -> None:
        # With colours as the terminal has them, the filter for NO_COLOR takes them all away.
        super().__init__(ansi_color=True if no_color else None)
        self.board = board
        self.pulse = Pulse()
        self.demo = Demo(board) if demo else None
        self._history = history
        self._themes = themes
        self._resume = resume
        self._aim_one = False
        self._editing: tuple[Talk, Message] | None = None
        self._left: Widget | None = None  # that had the focus when the room became too small
        self._ticks = 0
        self._typed = 0.0  # when a key was pressed last
        self._held = 0  # ticks that may still wait for it
        self._panel_wanted: bool | None = None

    def compose(self) -> ComposeResult:
        # The parts are kept, because a panel that is open hides them from queries.
        self.status, self.columns = Status(), Columns(self.board)
        self.panel, self.prompt = EnginePanel(self.board, self.pulse), Prompt(self._history)
        yield self.status
        yield Static("", id="banner", markup=False)
        with Horizontal(id="middle"):
            yield self.columns
            yield self.panel
        yield self.prompt
        yield Footer(compact=True, show_command_palette=True)
        yield Static("", id="small", markup=False)

    async def on_mount(self) -> None:
        self.register_theme(HIGH_CONTRAST)
        self.theme = self._themes.chosen(self.available_themes)
        self.theme_changed_signal.subscribe(self, lambda theme: self._themes.keep(theme.name))
        self.board.told = lambda error: self.notify(str(error), severity="error", markup=False)
        self.columns.show()
        self.columns.focused(self.columns.all[0])
        self.columns.all[0].say(WELCOME)
        self.prompt.focus()
        self._aim()
        self.set_interval(TICK / (PHASES + 1), self._tick)
        with suppress(NotImplementedError, ValueError, RuntimeError):
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, lambda: self.run_worker(self.action_leave()))
        if self.board.host:
            self.board.host.changed = self._engine_changed
            self.run_worker(self._open_engine(), exit_on_error=False)
        if self.demo:
            self.demo.start()

    async def _open_engine(self) -> None:
        assert self.board.host
        try:
            await self.board.host.open()
        except KvrunError as error:
            self.exit(error, return_code=error.exit_code)

    # -- parts ------------------------------------------------------------------------------

    @property
    def current(self) -> Column:
        return self.columns.current

    # -- time -------------------------------------------------------------------------------

    def _tick(self) -> None:
        """Everything that streams is shown here and nowhere else."""
        if not self.columns.is_attached:  # the app is being taken down
            return
        if self._held and time.perf_counter() - self._typed < HOLD:
            self._held -= 1  # the key's own frame comes first
            return
        phase = self._ticks % (PHASES + 1)
        self._ticks += 1
        # What changes at the same time is repainted as one rectangle around all of it.
        if phase < PHASES:
            self.columns.tick(phase, PHASES)
            return
        hidden = self.columns.hidden()
        self.status.show(status(self.board, self.pulse, hidden, max(20, self.size.width - 2)))
        if self._ticks % (SAMPLES * (PHASES + 1)) == 0:
            self.run_worker(self._sample(), group="sample", exclusive=True, exit_on_error=False)

    async def _sample(self) -> None:
        host = self.board.host
        stats = await host.stats() if host else None
        if stats is not None:
            self.pulse.take(stats)
        if self.panel.display:
            pages = await host.pages() if host else None
            if host and pages is not None:
                await host.refresh()
            self.panel.take(pages)

    def _engine_changed(self) -> None:
        """The engine is ready, has ended, or holds other adapters."""
        host = self.board.host
        assert host
        banner = self.screen_stack[0].query_one("#banner", Static)
        banner.set_class(host.failure is not None, "-shown")
        if host.failure:
            kept = "F9 starts it again. The conversations are kept."
            banner.update(printable(f"{host.failure}\n{kept}"))
        elif host.ready:
            self.board.engine_ready()
            if host.session.engine.note:
                self.notify(host.session.engine.note, markup=False)
            self.prompt.most = min(MOST_PASTE, BYTES_PER_TOKEN * host.session.context)
        self._aim()

    # -- room -------------------------------------------------------------------------------

    def on_resize(self, event: events.Resize) -> None:
        """Say so when there is too little room, and place the engine's panel."""
        width, height = event.size
        small = width < SMALL[0] or height < SMALL[1]
        screen = self.screen_stack[0]
        if small and not screen.has_class("-small"):
            self._left = screen.focused  # what is hidden loses the focus
        elif not small and self._left:
            self.call_after_refresh(self._left.focus)
            self._left = None
        screen.set_class(small, "-small")
        if small:
            text = f"{width}×{height} cells are too small.\nkvrun tui needs {SMALL[0]}×{SMALL[1]}."
            screen.query_one("#small", Static).update(text)
        self._place_panel(width)

    def _place_panel(self, width: int) -> None:
        """Beside the columns where there is room, unless the user has said otherwise."""
        wide = width >= 130
        shown = wide if self._panel_wanted is None else self._panel_wanted
        self.panel.set_class(shown, "-shown")

    def action_engine(self) -> None:
        """Show or hide the engine."""
        self._panel_wanted = not self.panel.has_class("-shown")
        self.panel.set_class(self._panel_wanted, "-shown")
        self.run_worker(self._sample(), group="sample", exclusive=True, exit_on_error=False)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While a panel is open, its keys are its own; only leaving works everywhere."""
        return len(self.screen_stack) == 1 or action == "leave" or action not in ACTIONS

    # -- asking -----------------------------------------------------------------------------

    @on(Prompt.Sent)
    async def sent(self, event: Prompt.Sent) -> None:
        """Ask, edit or obey. What cannot be done stays in the prompt."""
        try:
            if self._editing:
                talk, message = self._editing
                if talk.busy:
                    self.notify("that column still answers; Esc stops it")
                    return
                talk.edit(message.id, unquoted(event.text))
            elif is_command(event.text.strip()):
                await self._obey(event.text)
            elif not self._ask(event.text):
                return
        except KvrunError as error:
            self.notify(str(error), severity="error", markup=False)
            return
        self._editing = None
        self.prompt.empty()
        self._aim()

    def _ask(self, text: str) -> bool:
        """Ask those columns that are free; False when none is."""
        words = unquoted(self.board.words(text))
        targets = self.board.targets(text, self.current.talk, only_focused=self._aim_one)
        if not words:
            self.notify("there is no question behind the name")
            return False
        free = [talk for talk in targets if not talk.busy]
        if len(free) < len(targets):
            self.notify(f"{len(targets) - len(free)} still answering; Esc stops")
        for talk in free:
            talk.say(words)
        return bool(free)

    async def _obey(self, text: str) -> None:
        """A command works on the current column."""
        column = self.current
        if column.talk.busy:
            column.talk.stop()
            await column.talk.finished()
            column.tick()
        effect = await self._run(column.talk, text)
        column.head()
        if effect.wipe or effect.replay:
            column.rebuild()
        if effect.say:
            column.say(effect.say)
        if effect.ask:
            column.talk.again()
        if effect.leave:
            await self.action_leave()

    async def _run(self, talk: Talk, text: str) -> Effect:
        """A command's adapter is the column's, not the session's."""
        session = talk.chat.session
        if not self.board.local(talk):
            if find(text.split()[0]).name in LOCAL:
                raise InvalidRequest("that is for kvrun's own engine; here a server answers.")
            return await run(talk.chat, text)
        session.adapter = talk.speaker.adapter
        effect = await run(talk.chat, text)
        if session.adapter != talk.speaker.adapter:
            talk.speaker = Speaker(session.adapter)
        if self.board.host:
            await self.board.host.refresh()
        return effect

    @on(Prompt.Changed)
    def _changed(self) -> None:
        self.prompt.border_subtitle = Content(self.prompt.hint())

    @on(Prompt.Refused)
    def refused(self, event: Prompt.Refused) -> None:
        """A paste was too long."""
        most = self.prompt.most or 0
        self.notify(
            f"too long: {event.characters:,} characters were pasted; the model's context of "
            f"{most // BYTES_PER_TOKEN:,} tokens cannot hold more than {most:,}.",
            severity="error",
        )

    @on(Column.Edit)
    def edit(self, event: Column.Edit) -> None:
        """Take a question back into the prompt."""
        self._editing = (event.talk, event.message)
        self.prompt.replace_all(event.message.content)
        self.prompt.focus()
        self._aim()

    @on(Column.Focused)
    def column_focused(self, event: Column.Focused) -> None:
        self.columns.focused(event.column)
        self._aim()

    def _aim(self) -> None:
        """Say in the prompt's border where a question goes."""
        column = self.current
        if self._editing:
            title = f"edit → column {self.columns.of(self._editing[0]).number} · esc leaves it"
        elif self._aim_one or not any(talk.linked for talk in self.board.talks):
            title = f"prompt → {column.number} {column.talk.label} (F6) · / commands"
        else:
            count = sum(talk.linked for talk in self.board.talks)
            whom = "all" if count == len(self.board.talks) else f"{count} linked"
            title = f"prompt → {whom} (F6) · @name asks one · / commands"
        self.prompt.border_title = Content(printable(title))
        names = dict.fromkeys(talk.speaker.adapter or "base" for talk in self.board.talks)
        self.prompt.names = ["all", *names]

    # -- actions without a panel ----------------------------------------------------------------

    def action_aim(self) -> None:
        """Send questions to the current column only, or again to all that are linked."""
        self._aim_one = not self._aim_one
        self._aim()

    def action_focus_prompt(self) -> None:
        """Go to the prompt."""
        self.prompt.focus()

    def action_again(self) -> None:
        """Have the last question of every linked column answered again."""
        for column in self.columns.all:
            if column.talk.linked and column.talk.last_question and not column.talk.busy:
                column.talk.again()

    def action_stop(self) -> None:
        """Leave an edit; else stop the current column; else all of them."""
        if self._editing:
            self._editing = None
            self.prompt.replace_all("")
            self._aim()
        elif self.current.talk.busy:
            self.current.talk.stop()
        else:
            for talk in self.board.talks:
                talk.stop()

    def action_help_quit(self) -> None:
        """Ctrl+C: stop as Escape does while there is something to stop, else say how to leave."""
        if self._editing or any(talk.busy for talk in self.board.talks):
            self.action_stop()
        else:
            self.notify("^q leaves")

    async def action_renew(self) -> None:
        """Begin new conversations; the old ones are saved."""
        await self.board.settle()
        self.board.renew()
        for column in self.columns.all:
            column.rebuild()

    async def action_leave(self) -> None:
        """Stop everything, save everything, leave."""
        if self.demo:
            self.demo.stop()
        await self.board.settle()
        self.exit(None)

    async def on_event(self, event: events.Event) -> None:
        """A key is shown before anything else; it takes over from the demo, and only that."""
        if isinstance(event, events.Key):
            self._typed, self._held = time.perf_counter(), MOST_HELD
        if self.demo and self.demo.running and isinstance(event, events.Key | events.Paste):
            self.demo.stop()
            self.notify("the demo has stopped; the columns are yours")
            return
        await super().on_event(event)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The palette holds every action that has a key, and Textual's own."""
        for binding in APP:
            action = binding.action
            yield SystemCommand(
                binding.description, f"key: {binding.key}", lambda a=action: self._act(a)
            )
        for binding in COLUMNS:
            if "jump" not in (binding.id or "") and not binding.action.startswith("app."):
                yield SystemCommand(
                    binding.description,
                    f"key in a column: {binding.key_display or binding.key}",
                    lambda a=binding.action: self._act(a, self.columns),
                )
        yield from super().get_system_commands(screen)

    def _act(self, action: str, where: Columns | None = None) -> None:
        self.run_worker(self.run_action(action, where or self), exit_on_error=False)
