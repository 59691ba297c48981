"""Two columns word by word: what one says and the other does not."""

from difflib import SequenceMatcher
from typing import ClassVar, NamedTuple

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from kvrun.chat.printable import printable
from kvrun.tui.talk import Talk, summary

MOST_WORDS = 4000


class Difference(NamedTuple):
    """`parts` are (text, kind): "same", "left" (only there) or "right"; `agree` a share of 1."""

    parts: list[tuple[str, str]]
    agree: float


def difference(left: str, right: str) -> Difference:
    """Compare two texts word by word; spaces never differ on their own."""
    a, b = left.split()[:MOST_WORDS], right.split()[:MOST_WORDS]
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    parts: list[tuple[str, str]] = []
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        if kind == "equal":
            parts.append((" ".join(a[i1:i2]), "same"))
            continue
        if i2 > i1:
            parts.append((" ".join(a[i1:i2]), "left"))
        if j2 > j1:
            parts.append((" ".join(b[j1:j2]), "right"))
    return Difference(parts, matcher.ratio() if a or b else 1.0)


def marked(found: Difference) -> Content:
    """[-only left-] and {+only right+}: the marks tell it without colours too."""
    pieces: list[tuple[str, str]] = []
    for text, kind in found.parts:
        if kind == "left":
            pieces.append((f"[-{text}-]", "$text-error"))
        elif kind == "right":
            pieces.append((f"{{+{text}+}}", "$text-success"))
        else:
            pieces.append((text, ""))
        pieces.append((" ", ""))
    return Content.assemble(*pieces)


class CompareScreen(ModalScreen[None]):
    """The last answers of two columns; the arrow keys choose which two."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f3,q", "dismiss(None)", "Close", id="compare.close"),
        Binding("left", "other(0)", "Other left", id="compare.left"),
        Binding("right", "other(1)", "Other right", id="compare.right"),
    ]

    def __init__(self, talks: list[Talk], first: int) -> None:
        super().__init__()
        self._talks = talks
        self._pair = [first, (first + 1) % len(talks)]

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="panel"):
            yield Static(id="compare-text", markup=False)
            yield Static("← → another column · esc close", classes="keys", markup=False)

    def on_mount(self) -> None:
        self._show()

    def action_other(self, side: int) -> None:
        """Another column on one side, never the one of the other side."""
        count = len(self._talks)
        self._pair[side] = (self._pair[side] + 1) % count
        if self._pair[0] == self._pair[1]:
            self._pair[side] = (self._pair[side] + 1) % count
        self._show()

    def _show(self) -> None:
        places = self._pair
        left, right = (self._talks[place] for place in places)
        names = [f"{p + 1} {t.label}" for p, t in zip(places, (left, right), strict=True)]
        self.query_one(".panel").border_title = printable(
            f"compare: [-{names[0]}-] {{+{names[1]}+}}"
        )
        one, two = left.last_answer, right.last_answer
        if one is None or two is None:
            silent = names[0] if one is None else names[1]
            self.query_one("#compare-text", Static).update(printable(f"{silent} has no answer yet"))
            return
        found = difference(printable(one.content), printable(two.content))
        facts = [f"{n}: {summary(m.meta)}" for n, m in zip(names, (one, two), strict=True)]
        below = "\n".join(["", f"{found.agree:.0%} of the words agree", *facts])
        self.query_one("#compare-text", Static).update(marked(found) + Content(printable(below)))
