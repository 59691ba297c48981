"""The help: every key, made from the bindings themselves."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from kvrun.chat.commands import overview
from kvrun.tui.keys import GROUPS

WORDS = (
    "A question goes to all linked columns (⊘ marks those that are not); F6 sends it to the "
    "current one only. @pirate or @2 in front asks one column, @all every one; @@ sends an @.",
    "Columns answer at the same time, from one batch of one engine: F2 shows it.",
)


def shown(binding: Binding) -> str:
    """A binding's keys as a person reads them."""
    key = binding.key_display or binding.key.split(",")[0]
    return key.replace("ctrl+", "^")


def lines() -> list[str]:
    """The help as plain lines."""
    made = list(WORDS)
    for title, bindings in GROUPS:
        made += ["", title]
        made += [f"  {shown(b):<8} {b.description}" for b in bindings if "jump" not in (b.id or "")]
        if any("jump" in (b.id or "") for b in bindings):
            made.append(f"  {'1-9':<8} Column by number")
    made += ["  ^p       Every action, by name", "", "Commands"]
    return made + [f"  {line}" for line in overview()]


class HelpScreen(ModalScreen[None]):
    """Closes with Escape; scrolls."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f1,q", "dismiss(None)", "Close", id="help.close"),
        Binding("j,down", "scroll(1)", "Down", id="help.down", show=False),
        Binding("k,up", "scroll(-1)", "Up", id="help.up", show=False),
    ]

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="panel") as panel:
            panel.border_title = "help"
            panel.border_subtitle = "esc close"
            yield Static(Content("\n".join(lines())), markup=False)

    def action_scroll(self, step: int) -> None:
        """Move the text."""
        self.query_one(VerticalScroll).scroll_relative(y=step, animate=False)
