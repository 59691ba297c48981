"""Export: which columns, in which form, into which file."""

from pathlib import Path
from typing import NamedTuple

from textual import on
from textual.widgets import Input

from kvrun.tui.panels.picker import Picker, Row

ROWS = (
    Row("all.md", "all columns as Markdown", "the branches on the screen"),
    Row("all.jsonl", "all columns as JSONL", "every branch, one message a line"),
    Row("one.md", "the current column as Markdown"),
    Row("one.jsonl", "the current column as JSONL"),
)


class Wish(NamedTuple):
    path: Path
    everything: bool


class ExportScreen(Picker):
    """Ends with what `wish` reads: a row's key and the file's name."""

    def __init__(self, name: str) -> None:
        super().__init__("export", ROWS, hint="the file's name", free=True, value=name)

    @on(Input.Changed)
    def typed(self, event: Input.Changed) -> None:
        """The line is a name, no filter."""
        event.prevent_default()

    def chosen(self, key: str) -> None:
        """End with the choice and the name."""
        name = self.query_one(Input).value.strip()
        if name:
            self.dismiss(f"{key}|{name}")
        else:
            self.say("the file needs a name")


def wish(choice: str) -> Wish:
    """What an ExportScreen has ended with."""
    key, _, name = choice.partition("|")
    which, _, suffix = key.partition(".")
    path = Path(name).expanduser()
    if path.suffix not in (".md", ".jsonl"):
        path = path.with_name(f"{path.name}.{suffix}")
    elif path.suffix != f".{suffix}":
        path = path.with_suffix(f".{suffix}")
    return Wish(path, which == "all")
