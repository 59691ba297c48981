"""Columns: how many stand beside each other, and which of them are on the screen."""

from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import BindingType
from textual.containers import Container
from textual.message import Message

from kvrun.errors import KvrunError
from kvrun.tui.board import Board
from kvrun.tui.column import Column
from kvrun.tui.keys import COLUMNS
from kvrun.tui.talk import Talk

NARROW = 24  # cells a column needs to be worth reading
LOW = 6  # lines


class Columns(Container):
    """Keeps one Column for each Talk, in their order; lays them out for the room there is."""

    BINDINGS: ClassVar[list[BindingType]] = [*COLUMNS]

    @dataclass
    class Wanted(Message):
        """The user wants to say who answers: in a column, or in one more behind it."""

        column: Column
        more: bool

    def __init__(self, board: Board) -> None:
        super().__init__(id="columns")
        self._board = board
        self.zoomed = False
        self._current: Talk | None = None
        self._by_talk: dict[Talk, Column] = {}

    @property
    def all(self) -> list[Column]:
        return list(self._by_talk.values())

    @property
    def current(self) -> Column:
        """The column that has or last had the focus."""
        if focused := next((column for column in self.all if column.has_focus), None):
            return focused
        if self._current in self._by_talk:
            return self._by_talk[self._current]
        return self.all[0]

    def of(self, talk: Talk) -> Column:
        return self._by_talk[talk]

    def show(self) -> None:
        """Make the columns those of the board."""
        talks = self._board.talks
        for talk in [t for t in self._by_talk if t not in talks]:
            self._by_talk.pop(talk).remove()
        before, self._by_talk = self._by_talk, {}
        last: Column | None = None
        for number, talk in enumerate(talks, 1):
            column = before.get(talk)
            if column is None:
                column = Column(talk, number)
                self.mount(column, **({"after": last} if last else {"before": 0}))
            else:
                column.renumber(number)
            self._by_talk[talk] = last = column
        self.fit()

    def focused(self, column: Column) -> None:
        """Remember which column the user looks at; it has to be visible."""
        for other in self.all:
            other.set_class(other is column, "-current")
        if self._current is not column.talk:
            self._current = column.talk
            self.fit()

    def on_resize(self, event: events.Resize) -> None:
        self.fit()

    def fit(self) -> None:
        """As many columns as there is room for, the current one among them."""
        columns = self.all
        if not columns:
            return
        across, down = self._room(len(columns))
        at = columns.index(self.current)
        first = at if self.zoomed else min(at // (across * down) * across * down, len(columns) - 1)
        shown = columns[first : first + (1 if self.zoomed else across * down)]
        across = min(across, len(shown))
        for column in columns:
            column.display = column in shown
        self.styles.grid_size_columns = across
        self.styles.grid_size_rows = -(-len(shown) // across)

    def _room(self, count: int) -> tuple[int, int]:
        """Columns beside and below each other that can be read."""
        width, height = self.size if self.size.width else self.app.size
        across = max(1, min(count, width // NARROW))
        rows = -(-count // across)
        across = -(-count // rows)  # the same number in each row
        return across, max(1, min(rows, height // LOW))

    def hidden(self) -> int:
        """How many columns are not on the screen."""
        return sum(not column.display for column in self.all)

    def tick(self, phase: int = 0, phases: int = 1) -> None:
        """Show what has come; columns out of sight wait until they are seen.

        In each of several phases another part of them is shown: a key that is pressed meanwhile
        waits for one column, not for all.
        """
        shown = [column for column in self.all if column.display]
        for column in shown[phase::phases]:
            column.tick()

    # -- keys -------------------------------------------------------------------------------

    def action_step(self, step: int) -> None:
        """Go to the column beside this one, round the end."""
        columns = self.all
        columns[(columns.index(self.current) + step) % len(columns)].focus()

    def action_jump(self, number: int) -> None:
        """Go to a column by its number."""
        if number <= len(self.all):
            column = self.all[number - 1]
            self.focused(column)
            column.focus()

    def action_zoom(self) -> None:
        """Give the whole room to the current column, or give it back."""
        self.zoomed = not self.zoomed
        self.fit()

    def action_link(self) -> None:
        """Take the current column out of those that the prompt reaches, or back in."""
        talk = self.current.talk
        talk.linked = not talk.linked
        self.current.head()
        self.post_message(Column.Focused(self.current))

    def action_add(self) -> None:
        """One more column, behind the current one."""
        self.post_message(self.Wanted(self.current, True))

    def action_speaker(self) -> None:
        """Say who answers in the current column."""
        self.post_message(self.Wanted(self.current, False))

    def action_remove(self) -> None:
        """Take the current column away."""
        at = self.all.index(self.current)
        try:
            self._board.remove(self.current.talk)
        except KvrunError as error:
            self.notify(str(error), markup=False)
            return
        self.show()
        self.all[min(at, len(self.all) - 1)].focus()
        self.post_message(Column.Focused(self.current))
