"""Picker: a list to choose from, and a line to filter it or to name what is not in it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from kvrun.chat.printable import printable


@dataclass(frozen=True)
class Row:
    """`key` is what choosing it gives; `more` stands dimmed behind the label."""

    key: str
    label: str
    more: str = ""


class Picker(ModalScreen[str | None]):
    """Ends with the key of a row, with the text of the line when `free`, or with None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close", id="panel.close"),
        Binding("down", "move(1)", "Below", id="panel.below", show=False, priority=True),
        Binding("up", "move(-1)", "Above", id="panel.above", show=False, priority=True),
    ]

    def __init__(
        self, title: str, rows: Iterable[Row], *, hint: str, free: bool = False, value: str = ""
    ) -> None:
        super().__init__()
        self._heading = title
        self._rows = list(rows)
        self._hint = hint
        self._free = free
        self._value = value

    def compose(self) -> ComposeResult:
        with Vertical(classes="panel") as panel:
            panel.border_title = Content(printable(self._heading))
            yield Input(self._value, placeholder=self._hint, select_on_focus=False)
            yield OptionList(markup=False)
            yield Static("", classes="said", markup=False)
            yield Static(self.keys(), classes="keys", markup=False)

    def keys(self) -> str:
        """The line that says what can be done here."""
        return "enter choose · ↑↓ move · esc close"

    def on_mount(self) -> None:
        self.query_one(Input).focus()
        self.begin()

    def begin(self) -> None:
        """What the list holds at first."""
        self.fill(self._rows)

    def fill(self, rows: list[Row]) -> None:
        """Show these rows, keeping the place in the list."""
        options = self.query_one(OptionList)
        at = options.highlighted or 0
        options.clear_options()
        for row in rows:
            more = Content.assemble((f"  {printable(row.more)}", "dim")) if row.more else ""
            options.add_option(Option(Content(printable(row.label)) + more, id=row.key))
        if rows:
            options.highlighted = min(at, len(rows) - 1)

    def say(self, text: str) -> None:
        """Tell what went wrong."""
        self.query_one(".said", Static).update(printable(text))

    @property
    def highlighted(self) -> str | None:
        """The key of the row that the keys mean."""
        options = self.query_one(OptionList)
        if options.highlighted is None or not options.option_count:
            return None
        return options.get_option_at_index(options.highlighted).id

    def action_move(self, step: int) -> None:
        """Go to the row below or above."""
        options = self.query_one(OptionList)
        if step > 0:
            options.action_cursor_down()
        else:
            options.action_cursor_up()

    @on(Input.Changed)
    def typed(self, event: Input.Changed) -> None:
        """Show the rows that hold what was typed."""
        words = event.value.casefold().split()
        fits = [r for r in self._rows if all(w in f"{r.label} {r.more}".casefold() for w in words)]
        self.fill(fits)

    @on(Input.Submitted)
    def entered(self, event: Input.Submitted) -> None:
        """Take the highlighted row, else the text itself."""
        if (key := self.highlighted) is not None:
            self.chosen(key)
        elif self._free and event.value.strip():
            self.chosen(event.value.strip())

    @on(OptionList.OptionSelected)
    def clicked(self, event: OptionList.OptionSelected) -> None:
        """Take the row."""
        if event.option_id is not None:
            self.chosen(event.option_id)

    def chosen(self, key: str) -> None:
        """What a choice does: it ends the panel."""
        self.dismiss(key)
