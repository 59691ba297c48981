"""Saved conversations: the latest, those that hold some words; resumed as they stood."""

from collections.abc import Iterable
from typing import ClassVar

from textual import on
from textual.binding import Binding, BindingType
from textual.widgets import Input

from kvrun.chat.store import Saved, Store
from kvrun.errors import KvrunError
from kvrun.tui.panels.picker import Picker, Row

MOST = 200


def boards(saved: Iterable[Saved]) -> dict[str, list[Saved]]:
    """Conversations that stood side by side together, by their board; others by their name."""
    found: dict[str, list[Saved]] = {}
    for one in saved:
        found.setdefault(one.board or one.name, []).append(one)
    for group in found.values():
        group.sort(key=lambda one: one.name.rpartition(" ")[2].zfill(3))
    return found


class ConversationsScreen(Picker):
    """Ends with the key of a board, to be looked up in `boards(store.saved())`."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+d", "forget", "Forget", id="conversations.forget", priority=True),
    ]

    def __init__(self, store: Store) -> None:
        super().__init__("conversations", [], hint="words to search for")
        self._store = store

    def keys(self) -> str:
        return "type to search · enter resume · ^d forget · ↑↓ move · esc close"

    def begin(self) -> None:
        self._look("")

    @on(Input.Changed)
    def typed(self, event: Input.Changed) -> None:
        """Search for what was typed."""
        event.prevent_default()
        self._look(event.value)

    def _look(self, text: str) -> None:
        try:
            found = boards(self._store.search(text))
        except KvrunError as error:
            self.say(str(error))
            return
        self.fill([_row(key, group) for key, group in list(found.items())[:MOST]])
        self.say("" if found else "nothing is saved yet" if not text else "nothing holds that")

    def action_forget(self) -> None:
        """Remove what the row shows from the store, for good."""
        key = self.highlighted
        if key is None:
            return
        try:
            for one in boards(self._store.saved()).get(key, []):
                self._store.remove(one.name)
        except KvrunError as error:
            self.say(str(error))
        self._look(self.query_one(Input).value)


def _row(key: str, group: list[Saved]) -> Row:
    first = group[0]
    title = first.name.split(" · ")[0]
    who = ", ".join(dict.fromkeys(one.adapter or "base" for one in group))
    when = first.updated[:16].replace("T", " ")
    found = next((one.found for one in group if one.found), "")
    return Row(key, title, " · ".join([when, first.model, who, *([found] if found else [])]))
