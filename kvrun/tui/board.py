"""Board: the conversations that stand side by side; who is asked, and what is kept; no screen."""

import asyncio
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from kvrun.chat.commands import Chat
from kvrun.chat.conversation import Conversation
from kvrun.chat.export import Exported
from kvrun.chat.settings import Settings
from kvrun.chat.store import MAX_NAME, Saved, Store
from kvrun.errors import InvalidRequest, KvrunError, NotFound
from kvrun.tui.host import Host
from kvrun.tui.talk import BASE, Source, Speaker, Talk

MOST_COLUMNS = 16
_NAMED = re.compile(r"@([^\s@]+)\s*")


class Board:
    """`told` hears of failures that belong to no column; `chosen` are the user's own options."""

    def __init__(
        self,
        host: Host | None,
        store: Store | None,
        *,
        chosen: Mapping[str, Any] | None = None,
        system: str = "",
    ) -> None:
        self.host = host
        self.store = store
        self.talks: list[Talk] = []
        self.system = system
        self.told: Callable[[KvrunError], None] = lambda error: None
        self.name = _now()
        self._names: set[str] = set()  # of conversations that were saved on this board
        self._chosen = dict(chosen or {})
        self.unkept: set[Talk] = set()  # whose next answer nobody has asked for: it is not saved
        self._unsaved: dict[Talk, None] = {}
        self._trouble = ""  # what has kept the last conversation from being saved
        self._saving: asyncio.Task[None] | None = None
        self._open = asyncio.Event()  # the gate of servers, which is never shut
        self._open.set()
        Settings(self._chosen)

    # -- columns ----------------------------------------------------------------------------

    def add(
        self,
        speaker: Speaker,
        *,
        source: Source | None = None,
        conversation: Conversation | None = None,
        behind: Talk | None = None,
    ) -> Talk:
        """A column more; without a source it asks the engine. InvalidRequest for too many."""
        if len(self.talks) >= MOST_COLUMNS:
            raise InvalidRequest(f"there are {MOST_COLUMNS} columns already.")
        asked: Source | None = source or self.host
        if asked is None:
            raise InvalidRequest("there is no engine here.", hint="name a server's URL")
        local = source is None
        chat = Chat(
            self.host.session if self.host else None,  # type: ignore[arg-type]
            Settings(self._chosen),
            self.store or Store(),
            conversation or Conversation(self.system),
        )
        gate = self.host.gate if local and self.host else self._open
        talk = Talk(asked, chat, speaker, gate=gate, ended=self._has_ended)
        at = self.talks.index(behind) + 1 if behind in self.talks else len(self.talks)
        self.talks.insert(at, talk)
        if local:
            self._learn(talk)
        return talk

    def remove(self, talk: Talk) -> None:
        """Take a column away; its answer stops, its conversation stays in the store."""
        if len(self.talks) == 1:
            raise InvalidRequest("the last column stays.")
        talk.stop()
        self.talks.remove(talk)

    def give(self, talk: Talk, speaker: Speaker, source: Source | None) -> None:
        """Let somebody else answer in a column, from the next question on."""
        asked: Source | None = source or self.host
        assert asked
        gate = self.host.gate if source is None and self.host else self._open
        talk.become(speaker, asked, gate)

    def forget_adapters(self) -> None:
        """The engine holds another model: those adapters that it lacks give way to the base."""
        known = self.host.adapters if self.host else {}
        for talk in filter(self.local, self.talks):
            if talk.speaker.adapter not in known:
                talk.speaker = Speaker()

    def local(self, talk: Talk) -> bool:
        """Whether a column asks the engine of this machine."""
        return talk.source is self.host

    def engine_ready(self) -> None:
        """Take in what a (new) engine says of its model: its session, its defaults."""
        for talk in filter(self.local, self.talks):
            self._learn(talk)

    def _learn(self, talk: Talk) -> None:
        if self.host and self.host.ready:
            talk.chat.session = self.host.session
            talk.chat.settings.learn(self.host.session.text.generation_defaults)

    # -- who is asked -----------------------------------------------------------------------

    def targets(self, text: str, focused: Talk, *, only_focused: bool = False) -> list[Talk]:
        """The columns a text goes to, and below `words` the text without their names."""
        names = self._called_names(text)
        if names:
            return [t for t in self.talks if any(t in self._called(name) for name in names)]
        if only_focused:
            return [focused]
        return [t for t in self.talks if t.linked] or [focused]

    def words(self, text: str) -> str:
        """A text without the @names in front; "@@" at the start stands for one @."""
        text = text.strip()
        if text.startswith("@@"):
            return text[1:]
        while match := _NAMED.match(text):
            text = text[match.end() :]
        return text

    def _called_names(self, text: str) -> list[str]:
        text, names = text.strip(), []
        while not text.startswith("@@") and (match := _NAMED.match(text)):
            names.append(match[1].rstrip(",:"))
            text = text[match.end() :]
        return names

    def _called(self, name: str) -> list[Talk]:
        """The columns of a name: "all", a number, or who answers there."""
        wanted = name.casefold()
        found = [
            talk
            for number, talk in enumerate(self.talks, 1)
            if wanted in ("all", str(number), (talk.speaker.adapter or BASE).casefold())
        ]
        if not found:
            known = list(dict.fromkeys(t.speaker.adapter or BASE for t in self.talks))
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean @{near[0]}?" if near else f"columns: {', '.join(known)}, 1, 2 …"
            raise NotFound(f"no column is called '{name}'.", hint=hint + "; @@ sends an @")
        return found

    # -- what is kept -----------------------------------------------------------------------

    def _has_ended(self, talk: Talk) -> None:
        if talk in self.unkept:
            self.unkept.remove(talk)
        elif self.store is not None and len(talk.conversation):
            self._unsaved[talk] = None
            if self._saving is None:
                self._saving = asyncio.create_task(self._save())

    async def _save(self) -> None:
        """One after another, in a thread each: a disk may be slow."""
        assert self.store
        while self._unsaved:
            talk = next(iter(self._unsaved))
            del self._unsaved[talk]
            if talk.chat.saved_as is None:
                talk.chat.saved_as = self._title(talk)
            copy = Conversation.from_dict(talk.conversation.to_dict())
            try:
                await asyncio.to_thread(
                    self.store.save,
                    talk.chat.saved_as,
                    copy,
                    talk.source.name,
                    adapter=talk.speaker.adapter or "",
                    board=self.name,
                )
            except KvrunError as error:
                if str(error) != self._trouble:  # once, and not after each answer
                    self.told(error)
                self._trouble = str(error)
            else:
                self._trouble = ""
        self._saving = None

    def _title(self, talk: Talk) -> str:
        first = next((m.content for m in talk.conversation if m.role == "user"), "")
        words = "".join(c for c in " ".join(first.split()) if c.isprintable())[:48].strip()
        number = self.talks.index(talk) + 1 if talk in self.talks else MOST_COLUMNS
        name = ""
        while not name or name in self._names:
            # The number at the end is the column's place, by which a board is put together again.
            end = f" · {talk.label[:24]} · {self.name} {number}"
            name, number = words[: MAX_NAME - len(end)] + end, number + MOST_COLUMNS
        self._names.add(name)
        return name

    async def settle(self) -> None:
        """Stop all answers and wait until everything is saved."""
        for talk in self.talks:
            talk.stop()
        for talk in self.talks:
            await talk.finished()
        while self._saving:
            await asyncio.wait([self._saving])

    def renew(self) -> None:
        """Begin new conversations in all columns."""
        self.name, self._names = _now(), set()
        for talk in self.talks:
            talk.stop()
            talk.chat.conversation = Conversation(talk.conversation.system)
            talk.chat.saved_as = talk.chat.last = talk.error = None

    async def resume(self, rows: Iterable[Saved]) -> None:
        """Put saved conversations in the place of the columns. Raises NotFound."""
        assert self.store
        rows = list(rows)
        loaded = [await asyncio.to_thread(self.store.load, row.name) for row in rows]
        await self.settle()
        self.talks.clear()
        if rows[0].board:
            self.name = rows[0].board
            self._names = {row.name for row in rows}
        known = self.host.adapters if self.host else {}
        for row, conversation in zip(rows, loaded, strict=True):
            adapter = row.adapter if row.adapter in known or not self.host else None
            talk = self.add(Speaker(adapter or None), conversation=conversation)
            talk.chat.saved_as = row.name

    def exported(self, talks: Iterable[Talk]) -> list[Exported]:
        """What columns hold, ready to be written to a file."""
        kept = (talk for talk in talks if len(talk.conversation))
        return [Exported(t.conversation, t.source.name, t.speaker.adapter or "") for t in kept]


def _now() -> str:
    return datetime.now().isoformat(sep=" ", timespec="milliseconds")
