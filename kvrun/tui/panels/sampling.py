"""The sampling options of a column or of all, one field each, made from SamplingParams."""

from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from kvrun.chat.printable import printable
from kvrun.chat.settings import Setting, Settings
from kvrun.errors import KvrunError

DEFAULT = "default"


def written(value: Any) -> str:
    """A value as `SamplingParams` reads it back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ",".join(f"{k}:{v:g}" for k, v in value.items())
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return ",".join(map(str, value))
    if isinstance(value, tuple):
        quoted = ", ".join('"' + v.replace("\\", "\\\\").replace('"', '\\"') + '"' for v in value)
        return f"[{quoted}]".replace("\n", "\\n")
    return f"{value:g}" if isinstance(value, float) else str(value)


class SamplingScreen(ModalScreen[None]):
    """Enter applies what was changed. `columns` are (name, settings); `at` is the current one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close", id="sampling.close", priority=True),
        Binding("f6", "all", "All columns or one", id="sampling.all", priority=True),
        Binding("ctrl+r", "reset", "Reset", id="sampling.reset", priority=True),
        Binding("down", "app.focus_next", "Next", id="sampling.next", show=False, priority=True),
        Binding("up", "app.focus_previous", "Above", id="sampling.up", show=False, priority=True),
    ]  # fmt: skip

    def __init__(self, columns: list[tuple[str, Settings]], at: int) -> None:
        super().__init__()
        self._columns = columns
        self._at = at
        self._everywhere = False
        self._shown: dict[str, str] = {}

    def compose(self) -> ComposeResult:
        with Vertical(classes="panel"):
            with VerticalScroll(id="sampling-fields"):
                for setting in self._columns[self._at][1].all():
                    with Horizontal(classes="field"):
                        yield Label(setting.name, classes="name", markup=False)
                        yield Input(id=f"option-{setting.name}", select_on_focus=True)
                        yield Label("", id=f"origin-{setting.name}", classes="origin", markup=False)
            yield Static("", id="sampling-help", markup=False)
            yield Static("", classes="said", markup=False)
            keys = "enter apply · F6 this column or all · ^r reset · esc close"
            yield Static(keys, classes="keys", markup=False)

    def on_mount(self) -> None:
        self._show()
        self.query_one(Input).focus()

    @property
    def _settings(self) -> Settings:
        return self._columns[self._at][1]

    def _show(self) -> None:
        name = "all columns" if self._everywhere else f"column {self._columns[self._at][0]}"
        self.query_one(".panel").border_title = Content(printable(f"sampling → {name}"))
        for setting in self._settings.all():
            text = written(setting.value)
            self._shown[setting.name] = text
            self.query_one(f"#option-{setting.name}", Input).value = text
            origin = "" if setting.origin == "default" else f"from: {setting.origin}"
            self.query_one(f"#origin-{setting.name}", Label).update(origin)

    def on_descendant_focus(self) -> None:
        if isinstance(self.focused, Input) and self.focused.id:
            name = self.focused.id.removeprefix("option-")
            setting = self._setting(name)
            self.query_one("#sampling-help", Static).update(f"{name}: {setting.help}")

    def _setting(self, name: str) -> Setting:
        return next(s for s in self._settings.all() if s.name == name)

    @on(Input.Submitted)
    def apply(self) -> None:
        """Set every field that was changed; the panel stays when one is refused."""
        settings = [s for _, s in self._columns] if self._everywhere else [self._settings]
        try:
            for name, before in self._shown.items():
                text = self.query_one(f"#option-{name}", Input).value
                if text != before:
                    for one in settings:
                        one.set(name, text if text.strip() else DEFAULT)
        except KvrunError as error:
            self.query_one(".said", Static).update(printable(error.what))
            return
        self.dismiss(None)

    def action_all(self) -> None:
        """Mean all columns, or again this one."""
        self._everywhere = not self._everywhere
        name = "all columns" if self._everywhere else f"column {self._columns[self._at][0]}"
        self.query_one(".panel").border_title = Content(printable(f"sampling → {name}"))

    def action_reset(self) -> None:
        """Give every choice back."""
        for _, settings in self._columns if self._everywhere else [self._columns[self._at]]:
            for setting in settings.all():
                settings.set(setting.name, DEFAULT)
        self._show()
