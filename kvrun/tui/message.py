"""Messages as widgets: a question, an answer that grows, an answer as Markdown."""

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Markdown, Static

from kvrun.chat.blocks import split
from kvrun.chat.conversation import Message
from kvrun.chat.printable import printable

CURSOR = "▌"
PART = 1500  # characters that make a widget of their own
MOST_GROWING = 4000  # of a block that has no end yet; beyond, it is cut to keep repainting cheap
MOST_MARKDOWN = 16_000  # a single block that is longer stays plain


def parser() -> MarkdownIt:
    """CommonMark with tables; HTML is text, and a line break stays one (poems)."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    markdown.core.ruler.push("hard_breaks", _hard_breaks)
    return markdown


def _hard_breaks(state: StateCore) -> None:
    for token in state.tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"


class Rendered(Markdown):
    """Markdown of a model: nothing in it is opened without asking."""

    def __init__(self, text: str) -> None:
        super().__init__(text, parser_factory=parser, open_links=False)


class Entry(Vertical):
    """What stands in a column: one message, or the answer that comes."""

    message: Message | None = None

    def select(self, selected: bool) -> None:
        """Show whether the keys of a message mean this one."""
        self.set_class(selected, "-selected")


class Question(Entry):
    """What was asked; `versions` is like "2/3" when there are others."""

    def __init__(self, message: Message, versions: str = "") -> None:
        super().__init__(classes="question")
        self.message = message
        self._versions = versions

    def compose(self) -> ComposeResult:
        assert self.message
        mark = Content.assemble(("› ", "bold $accent"), _versions(self._versions))
        yield Static(mark + Content(printable(self.message.content)), markup=False)


class Note(Entry):
    """Something kvrun says itself, below what stands there."""

    def __init__(self, text: str, *, error: bool = False) -> None:
        super().__init__(classes="note error" if error else "note")
        self._text = text

    def compose(self) -> ComposeResult:
        yield Static(Content(printable(self._text)), markup=False)


class Answer(Entry):
    """An answer: plain while its last block grows, Markdown as soon as a block is complete."""

    def __init__(self, message: Message | None = None, versions: str = "") -> None:
        super().__init__(classes="answer")
        self.message = message
        self._growing = ""  # text that no widget but the last holds
        self._plain: list[Static] = []  # widgets of a block that was cut
        self._cut = ""  # their text
        self._versions = versions
        self._tail = Static(Content(""), markup=False, classes="tail")

    def compose(self) -> ComposeResult:
        if self._versions:
            yield Static(_versions(self._versions), markup=False)
        text = printable(self.message.content) if self.message else ""
        for part in _parts(text):
            yield _widget(part)
        if self.message is None:
            yield self._tail

    def grow(self, text: str) -> None:
        """Show some more. What of it is complete becomes Markdown, so that little is repainted."""
        self._growing += text
        done, rest = split(self._cut + self._growing)
        complete = "".join(done)
        if len(complete) >= PART:
            self._settle(complete)
            self._growing = rest
        elif len(self._growing) > MOST_GROWING:
            at = self._growing.rfind("\n", 0, MOST_GROWING) + 1 or MOST_GROWING
            self._put(self._growing[:at])
            self._growing = self._growing[at:]
        self._tail.update(Content(self._growing + CURSOR))

    def finish(self, message: Message | None) -> None:
        """The answer is complete (and has become a message, unless it is empty)."""
        self.message = message
        self._settle(self._cut + self._growing)
        self._growing = ""
        self._tail.update(Content(""))
        self._tail.display = False

    def _put(self, text: str) -> None:
        """A piece of a block whose end has not come; it is Markdown only once that is known."""
        part = Static(Content(text.removesuffix("\n")), markup=False)
        self._cut += text
        self._plain.append(part)
        self.mount(part, before=self._tail)

    def _settle(self, text: str) -> None:
        """Markdown takes the place of the plain widgets, once it is laid out."""
        old, self._plain, self._cut = self._plain, [], ""
        shown = list(_parts(text))
        before = self._tail
        if old:
            for widget in old:
                widget.remove()
        for part in shown:
            self.mount(_widget(part), before=before)


def _widget(text: str) -> Static | Rendered:
    if len(text) > MOST_MARKDOWN:
        return Static(Content(text.strip("\n")), markup=False)
    return Rendered(text)


def _parts(text: str) -> list[str]:
    """A text cut between blocks, so that no widget is much longer than `PART`."""
    done, rest = split(text)
    parts: list[str] = []
    for block in [*done, rest]:
        if parts and len(parts[-1]) + len(block) <= PART:
            parts[-1] += block
        elif block.strip():
            parts.append(block)
    return parts


def _versions(versions: str) -> Content:
    return Content.assemble((f"‹{versions}› ", "dim")) if versions else Content("")
