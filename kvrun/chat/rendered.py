"""Markdown as lines of styled text, for whatever shows them."""

from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown
from rich.segment import Segment

_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def rendered(console: Console, text: str, code_theme: str = "ansi_dark") -> list[list[Segment]]:
    """The lines of a Markdown text at the console's width; nothing pads them to it.

    HTML is text here, links stand as text with their address, and a line break stays one (poems).
    """
    if not text.strip():
        return []
    markdown = Markdown("", hyperlinks=False, code_theme=code_theme)
    markdown.parsed = _PARSER.parse(text)
    for token in markdown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    kept = [_stripped(segments) for segments in console.render_lines(markdown, pad=False)]
    while kept and not kept[-1]:
        kept.pop()
    while kept and not kept[0]:
        kept.pop(0)
    return kept


def _stripped(segments: list[Segment]) -> list[Segment]:
    """A line without the spaces at its end, which would wrap when the terminal narrows."""
    kept = [s for s in segments if not s.control]
    while kept and not kept[-1].text.rstrip():
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style)
    return kept
