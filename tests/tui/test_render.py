"""The screen as text at three sizes, against what it should look like, drawn by hand."""

# ruff: noqa: E501  (the widest drawing has 200 columns)

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from kvrun.tui.pulse import Pulse
from kvrun.tui.talk import Talk

Show = Callable[..., Any]

AT_80 = """\
 kvrun  toy  ·  40.0 tok/s  ·  4 columns  ·  batch 0  queue 0  ·  KV 0%
╭─ 1 base ─────────────────────────────╮╭─ 2 sql ──────────────────────────────╮
│ › say hello                          ││ › say hello                          │
│   hello                              ││   hello                              │
│                                      ││                                      │
│                                      ││                                      │
│                                      ││                                      │
│                                      ││                                      │
│                                      ││                                      │
╰───────────────── 6t 40/s 0.02s stop ─╯╰───────────────── 6t 40/s 0.02s stop ─╯
╭─ 3 json ─────────────────────────────╮╭─ 4 pirate ───────────────────────────╮
│ › say hello                          ││ › say hello                          │
│   hello                              ││   hello                              │
│                                      ││                                      │
│                                      ││                                      │
│                                      ││                                      │
│                                      ││                                      │
│                                      ││                                      │
│                                      ││                                      │
╰───────────────── 6t 40/s 0.02s stop ─╯╰───────────────── 6t 40/s 0.02s stop ─╯
┏━ prompt → all (F6) · @name asks one · / commands ━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃                                                                              ┃
┗━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┛
"""
AT_120 = """\
 kvrun  toy  ·  40.0 tok/s  ·  4 columns  ·  batch 0  queue 0  ·  KV 0%  ·  float32 on cpu
╭─ 1 base ───────────────────╮╭─ 2 sql ────────────────────╮╭─ 3 json ───────────────────╮╭─ 4 pirate ─────────────────╮
│ › say hello                ││ › say hello                ││ › say hello                ││ › say hello                │
│   hello                    ││   hello                    ││   hello                    ││   hello                    │
"""
AT_200 = """\
 kvrun  toy  ·  40.0 tok/s  ·  4 columns  ·  batch 0  queue 0  ·  KV 0%  ·  float32 on cpu
╭─ 1 base ─────────────────────────────╮╭─ 2 sql ───────────────────────────────╮╭─ 3 json ─────────────────────────────╮╭─ 4 pirate ────────────────────────────╮╭─ engine (F2) ──────────────────────╮
│ › say hello                          ││ › say hello                           ││ › say hello                          ││ › say hello                           ││ throughput     40.0 tok/s          │
│   hello                              ││   hello                               ││   hello                              ││   hello                               ││ ▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁ │
"""


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that do not depend on the machine."""
    monkeypatch.setattr(Talk, "line", lambda talk, width=80: "6t 40/s 0.02s stop")
    monkeypatch.setattr(Pulse, "rate", lambda pulse, counter: 40.0)
    monkeypatch.setattr(Pulse, "speeds", lambda pulse, count: [])


@pytest.mark.parametrize("no_color", [False, True], ids=["colour", "NO_COLOR"])
@pytest.mark.parametrize(
    ("size", "drawn"),
    [((80, 24), AT_80), ((120, 35), AT_120), ((200, 50), AT_200)],
    ids=["80x24", "120x35", "200x50"],
)
async def test_the_screen_looks_as_drawn(
    show: Show, size: tuple[int, int], drawn: str, no_color: bool
) -> None:
    async with show("sql", "json", "pirate", size=size, no_color=no_color) as screen:
        await screen.ask("say hello")
        await screen.answered()
        await screen.sees("throughput" if size[0] >= 130 else "KV 0%")
        wanted = drawn.splitlines()
        with contextlib.suppress(AssertionError):  # the next one says more
            await screen.until(lambda: screen.lines()[: len(wanted)] == wanted)
        assert screen.lines()[: len(wanted)] == wanted
        assert "f1 Help" in screen.lines()[-1]


async def test_no_colour_means_none(show: Show) -> None:
    async with show("sql", size=(150, 30), no_color=True) as screen:
        await screen.ask("say # Title\n\n`code` and **strong**")
        await screen.answered()
        screen.app.action_sampling()
        await screen.sees("temperature")
        for strip in screen.app.screen._compositor.render_strips():
            filtered = strip.apply_filter(
                screen.app._filters[-1], screen.app.screen.styles.background
            )
            for segment in filtered:
                colors = (segment.style.color, segment.style.bgcolor) if segment.style else ()
                assert all(color is None or color.is_default for color in colors), segment


async def test_state_is_told_without_colour(show: Show) -> None:
    async with show("sql", size=(100, 20), no_color=True) as screen:
        screen.column(2).focus()
        await screen.sees("┏━ 2 sql")  # the focus, by its border
        await screen.pilot.press("space")
        await screen.sees("2 sql ⊘")
        await screen.ask("@1 say x")
        await screen.answered()
        screen.column(1).focus()
        await screen.pilot.press("k")
        await screen.until(lambda: any(line.startswith("┃▌") for line in screen.lines()))
