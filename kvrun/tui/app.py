"""TuiApp: the desk with the panels that open above it, and what comes of them."""

from datetime import datetime

from textual import on
from textual.screen import Screen

from kvrun.chat.export import write
from kvrun.chat.remote import Remote
from kvrun.errors import InvalidRequest, KvrunError
from kvrun.hub.local import adapters_of, builtin_names, cached_names
from kvrun.tui.columns import Columns
from kvrun.tui.desk import Desk
from kvrun.tui.panels.adapters import AdaptersScreen
from kvrun.tui.panels.compare import CompareScreen
from kvrun.tui.panels.conversations import ConversationsScreen, boards
from kvrun.tui.panels.export import ExportScreen, wish
from kvrun.tui.panels.help import HelpScreen
from kvrun.tui.panels.picker import Picker, Row
from kvrun.tui.panels.sampling import SamplingScreen
from kvrun.tui.solo import compare, questions
from kvrun.tui.talk import BASE, Source, Speaker


class TuiApp(Desk):
    """Every `action_` here is a key of `keys.APP`."""

    async def _open_engine(self) -> None:
        await super()._open_engine()
        if self._resume and self.board.host and self.board.host.ready:
            self._work(self.resume())

    def action_help(self) -> None:
        """Show every key and command."""
        self._open(HelpScreen())

    def _open(self, screen: Screen[None]) -> None:
        if len(self.screen_stack) == 1:  # a key pressed twice opens one panel
            self.push_screen(screen)

    def _work(self, coroutine: object) -> None:
        """Run something that may fail with a message."""

        async def run() -> None:
            try:
                await coroutine  # type: ignore[misc]
            except KvrunError as error:
                self.notify(str(error), severity="error", markup=False)

        self.run_worker(run(), exit_on_error=False)

    # -- columns ----------------------------------------------------------------------------

    @on(Columns.Wanted)
    def speaker_wanted(self, event: Columns.Wanted) -> None:
        """Say who answers in a column, or in a new one behind it."""
        self._work(self._choose_speaker(event))

    async def _choose_speaker(self, event: Columns.Wanted) -> None:
        talk = event.column.talk
        host = self.board.host
        rows = []
        if host:
            rows.append(Row(BASE, BASE, host.name))
            rows += [Row(f"@{n}", n, "adapter") for n in host.adapters]
        elif isinstance(talk.source, Remote):
            rows = [Row(f"@{name}", name, "model") for name in await talk.source.models()]
        title = "a new column: who answers?" if event.more else "who answers here?"
        hint = "a name below, or the URL of an OpenAI-compatible server"
        key = await self.push_screen_wait(Picker(title, rows, hint=hint, free=True))
        if key is None:
            return
        source: Source | None = talk.source if isinstance(talk.source, Remote) else None
        if key == BASE or key.startswith("@"):
            speaker = Speaker(None if key == BASE else key[1:])
            if host and not isinstance(talk.source, Remote):
                source = None
        else:
            source, speaker = await self._server(key)
        if event.more:
            self.board.add(speaker, source=source, behind=talk)
        elif talk.busy:
            raise InvalidRequest("the column still answers.", hint="x stops it")
        else:
            self.board.give(talk, speaker, source)
        self.columns.show()
        self.columns.of(talk).head()
        self._aim()

    async def _server(self, url: str) -> tuple[Remote, Speaker]:
        """A server's models, one of which is chosen."""
        remote = Remote(url)
        names = await remote.models()
        if not names:
            raise InvalidRequest(f"{remote.address} lists no model.")
        if len(names) > 1:
            rows = [Row(name, name) for name in names]
            picked = await self.push_screen_wait(
                Picker(str(remote.address), rows, hint="which of its models?")
            )
            names = [picked or names[0]]
        remote.model = names[0]
        return remote, Speaker(names[0])

    # -- panels -----------------------------------------------------------------------------

    def action_compare(self) -> None:
        """Compare the current column's last answer with another's."""
        talks = self.board.talks
        if len(talks) < 2:
            self.notify("there is one column only; + adds another")
            return
        self._open(CompareScreen(talks, talks.index(self.current.talk)))

    def action_sampling(self) -> None:
        """Set sampling options."""
        talks = self.board.talks
        columns = [(f"{n} ({t.label})", t.chat.settings) for n, t in enumerate(talks, 1)]
        self._open(SamplingScreen(columns, talks.index(self.current.talk)))

    def action_adapters(self) -> None:
        """Load, unload and scale adapters."""
        host = self.board.host
        if host is None or not host.ready:
            self.notify("the engine is not there" if host else "a server has its own adapters")
            return
        self._work(self._adapters())

    async def _adapters(self) -> None:
        host = self.board.host
        assert host
        if len(self.screen_stack) > 1:
            return
        await host.refresh()
        await self.push_screen_wait(AdaptersScreen(self.board, adapters_of(host.name)))
        for column in self.columns.all:
            column.head()

    def action_conversations(self) -> None:
        """Find and resume what was said before."""
        if self.board.store is None:
            self.notify("nothing is saved here (--no-save)")
        elif len(self.screen_stack) == 1:
            self._work(self._conversations())

    async def _conversations(self) -> None:
        assert self.board.store
        key = await self.push_screen_wait(ConversationsScreen(self.board.store))
        if key is not None:
            await self.resume(key)

    async def resume(self, key: str | None = None) -> None:
        """Put the conversations of a board (None: the latest) into the columns."""
        assert self.board.store
        found = boards(self.board.store.saved())
        if not found:
            raise InvalidRequest("no conversation is saved yet.")
        rows = found.get(key) if key is not None else next(iter(found.values()))
        if not rows:
            raise InvalidRequest("that conversation is not there any more.")
        await self.board.resume(rows)
        self.columns.show()
        self.columns.focused(self.columns.all[0])
        self._aim()

    def action_export(self) -> None:
        """Write conversations to a file."""
        if len(self.screen_stack) == 1:
            self._work(self._export())

    async def _export(self) -> None:
        name = f"kvrun-{datetime.now():%Y-%m-%d-%H%M%S}"
        choice = await self.push_screen_wait(ExportScreen(name))
        if choice is None:
            return
        path, everything = wish(choice)
        talks = self.board.talks if everything else [self.current.talk]
        found = self.board.exported(talks)
        if not found:
            raise InvalidRequest("there is nothing to export yet.")
        write(path, found)
        self.notify(f"written: {path}", markup=False)

    def action_model(self) -> None:
        """Go on with another model."""
        if self.board.host is None:
            self.notify("the columns ask a server; m chooses its model")
        elif len(self.screen_stack) == 1:
            self._work(self._model())

    async def _model(self) -> None:
        host = self.board.host
        assert host
        rows = [Row(name, name, "built in") for name in builtin_names()]
        rows += [Row(name, name, "Hugging Face cache") for name in cached_names()]
        hint = "a name below, or the path of a folder"
        name = await self.push_screen_wait(Picker("model", rows, hint=hint, free=True))
        if name is None:
            return
        await self.board.settle()
        await host.switch(name)
        self.board.forget_adapters()
        for column in self.columns.all:
            column.head()
            column.say(f"{host.name} answers from here on")

    def action_restart(self) -> None:
        """Start the engine again, if it has ended."""
        host = self.board.host
        if host is None or host.failure is None:
            self.notify("the engine runs" if host else "a server is not kvrun's to restart")
        else:
            self._work(host.restart())

    # -- solo or batched ----------------------------------------------------------------------

    def action_solo(self) -> None:
        """Run the columns' questions in one batch and one by one, and show the ratio."""
        if any(talk.busy for talk in self.board.talks):
            self.notify("wait for the answers first; Esc stops them")
        elif not any(worker.group == "solo" and worker.is_running for worker in self.workers):
            self.run_worker(self._solo(), group="solo", exit_on_error=False)

    async def _solo(self) -> None:
        panel = self.panel

        def said(line: str) -> None:
            panel.solo = line

        try:
            outcome = await compare(questions(self.board), said)
        except KvrunError as error:
            panel.solo = ""
            self.notify(str(error), severity="error", markup=False)
            return
        panel.solo = str(outcome)
        self.notify(str(outcome), timeout=10)
