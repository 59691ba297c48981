"""Bars beside their limits: as text for a terminal, as SVG for a page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from kvrun.bench.table import number
from kvrun.errors import KvrunError

EIGHTHS = " ▏▎▍▌▋▊▉█"
WIDTH = 40  # characters of the longest bar
LABEL, BAR, VALUE, ROW, HEAD = 270, 460, 160, 24, 56  # pixels
COLORS = ("#2f6fb0", "#d1812c", "#4a9b5f", "#8a63ac", "#b5484e")


class Bar(NamedTuple):
    """A value to show; `limit` is what the machine could do, `group` gives it its colour."""

    label: str
    value: float
    limit: float | None = None
    group: str = ""


def chart(title: str, bars: Sequence[Bar]) -> str:
    """Lines of text: each bar as long as its value, with a mark │ where its limit lies."""
    most = _most(bars)
    labels = max((len(bar.label) for bar in bars), default=0)
    lines = [title]
    for bar in bars:
        eighths = round(bar.value / most * WIDTH * 8)
        drawn = EIGHTHS[-1] * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        if bar.limit is not None:
            place = round(bar.limit / most * WIDTH)
            drawn = drawn[:place].ljust(place) + "│" + drawn[place + 1 :]
        lines.append(f"{bar.label.ljust(labels)} {drawn.ljust(WIDTH + 1)} {number(bar.value)}")
    return "\n".join(lines)


def svg(title: str, note: str, bars: Sequence[Bar]) -> str:
    """A picture of the same, on a white ground so that light and dark pages both suit it."""
    most = _most(bars)
    groups = list(dict.fromkeys(bar.group for bar in bars))
    width, height = LABEL + BAR + VALUE, HEAD + ROW * len(bars) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="ui-sans-serif, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(16, 24, title, 'font-size="15" font-weight="bold"'),
        _text(16, 44, note, 'fill="#666"'),
    ]
    for place, bar in enumerate(bars):
        y = HEAD + ROW * place
        length = BAR * bar.value / most
        color = COLORS[groups.index(bar.group) % len(COLORS)]
        parts.append(_text(LABEL - 8, y + 16, bar.label, 'text-anchor="end"'))
        parts.append(
            f'<rect x="{LABEL}" y="{y + 4}" width="{length:.1f}" height="{ROW - 8}" '
            f'fill="{color}"/>'
        )
        if bar.limit is not None:
            x = LABEL + BAR * bar.limit / most
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y + 1}" y2="{y + ROW - 1}" stroke="#222" '
                'stroke-width="2"/>'
            )
        end = max(length, BAR * (bar.limit or 0.0) / most)
        parts.append(_text(LABEL + end + 8, y + 16, _said(bar)))
    return "\n".join([*parts, "</svg>", ""])


def save(path: Path, picture: str) -> None:
    """Write an SVG. Raises KvrunError where that is not possible."""
    try:
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        raise KvrunError(f"{path} cannot be written.", cause=error.strerror or "") from error


def _most(bars: Sequence[Bar]) -> float:
    return max((max(bar.value, bar.limit or 0.0) for bar in bars), default=0.0) or 1.0


def _said(bar: Bar) -> str:
    if not bar.limit:
        return number(bar.value)
    return f"{number(bar.value)} ({100 * bar.value / bar.limit:.0f} %)"


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y}" {style}>{escape(text)}</text>'
