"""The parts without a screen: the map of pages, rates, differences, growing answers, the board."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.style import Style

from kvrun.chat.conversation import Message
from kvrun.runtime.engine.request import Pages, Stats
from kvrun.runtime.sampling.params import SamplingParams, parse
from kvrun.tui.entry import Answer, Growing, Ink
from kvrun.tui.pages import Cell, page_map
from kvrun.tui.panels.compare import difference
from kvrun.tui.panels.export import wish
from kvrun.tui.panels.sampling import written
from kvrun.tui.pulse import Pulse, bar, sparkline
from kvrun.tui.solo import Outcome
from kvrun.tui.talk import summary


def test_a_page_shows_its_column_and_a_shared_one_says_so() -> None:
    pages = Pages(total=10, requests={"a": [1, 2], "b": [1, 4], "x": [5]}, cached=[7])
    found = page_map(pages, {"a": 1, "b": 2}, room=8)
    assert "".join(cell.mark for cell in found.cells) == "s1·2?·○·"
    assert found.cells[3] == Cell("2", 2)
    assert (found.used, found.shared, found.cached, found.scale) == (4, 1, 1, 1)


def test_a_map_without_room_has_several_pages_in_a_cell() -> None:
    pages = Pages(total=1000, requests={"a": list(range(1, 9)), "b": [10]}, cached=[])
    found = page_map(pages, {"a": 1, "b": 2}, room=4)
    assert found.scale == 3
    assert "".join(cell.mark for cell in found.cells) == "1112"


def test_a_place_beyond_nine_is_a_letter() -> None:
    assert page_map(Pages(total=2, requests={"a": [1]}), {"a": 11}, 2).cells[0] == Cell("b", 11)


def test_rates_are_those_of_the_last_second() -> None:
    pulse = Pulse()
    assert (pulse.rate("steps"), pulse.prefill_share, pulse.hit_rate) == (0, None, None)
    for tenth in range(31):
        made = 0 if tenth < 20 else (tenth - 20) * 8
        pulse.take(Stats(steps=tenth, generated_tokens=made), at=tenth / 10)
    assert pulse.rate("generated_tokens") == pytest.approx(80)
    assert pulse.rate("steps") == pytest.approx(10)
    assert pulse.speeds(2) == [pytest.approx(80), pytest.approx(80)]


def test_prefill_share_and_hits() -> None:
    pulse = Pulse()
    pulse.take(Stats(), at=0)
    pulse.take(Stats(steps=1, prompt_tokens=30, generated_tokens=10, prefix_hit_tokens=90), at=1)
    assert pulse.prefill_share == 0.75
    assert pulse.hit_rate == 0.75


def test_a_new_engine_begins_anew() -> None:
    pulse = Pulse()
    pulse.take(Stats(steps=900, generated_tokens=900), at=0)
    pulse.take(Stats(steps=1, generated_tokens=1), at=1)
    assert pulse.rate("generated_tokens") == 0


def test_bars() -> None:
    assert sparkline([0, 4, 8], 5) == "▁▁▁▄█"
    assert sparkline([], 3) == "▁▁▁"
    assert bar(0.5, 4) == "██░░"
    assert (bar(9, 2), bar(-1, 2)) == ("██", "░░")


def test_a_difference_puts_the_text_together_again() -> None:
    found = difference("the red fox runs", "the fox  runs\nhome")
    assert found.parts == [
        ("the", "same"), ("red", "left"), ("fox runs", "same"), ("home", "right"),
    ]  # fmt: skip
    assert found.agree == 0.75
    assert difference("", "").agree == 1


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abc"), max_size=9))
@settings(max_examples=60, deadline=None)
def test_no_word_is_lost_in_a_difference(left: list[str], right: list[str]) -> None:
    found = difference(" ".join(left), " ".join(right))
    sides = {
        side: " ".join(text for text, kind in found.parts if kind in ("same", side)).split()
        for side in ("left", "right")
    }
    assert sides == {"left": left, "right": right}


@pytest.mark.parametrize("option", SamplingParams.options(), ids=lambda option: option.name)
def test_every_value_is_written_as_it_is_read(option: object) -> None:
    examples = {
        "int": 3, "float": 0.25, "bool": True, "texts": ("a,b", 'say "x"\n', "\\"),
        "ids": (4, 5), "biases": {7: -2.5},
    }  # fmt: skip
    value = examples[option.type]  # type: ignore[attr-defined]
    assert parse(option.name, written(value)) == value  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("choice", "name", "everything"),
    [
        ("all.md|talk", "talk.md", True),
        ("one.jsonl|talk.md", "talk.jsonl", False),
        ("all.md|my.talk", "my.talk.md", True),
    ],
)
def test_the_name_of_an_export(choice: str, name: str, everything: bool) -> None:
    assert wish(choice) == (wish(choice).path.with_name(name), everything)


def test_the_words_below_a_column() -> None:
    meta = {
        "completion_tokens": 97, "tokens_per_second": 40.8, "first_token_seconds": 0.083,
        "finish_reason": "stop",
    }  # fmt: skip
    assert summary(meta) == "97 tok · 40.8 tok/s · first 0.08 s · stop"
    assert summary(meta, short=True) == "97t 41/s 0.08s stop"
    assert summary(meta, running=True) == "97 tok · 40.8 tok/s · first 0.08 s"
    assert summary({}) == ""


def test_the_ratio_counts_tokens_and_not_only_seconds() -> None:
    outcome = Outcome(4, together=2.0, alone=6.0, tokens_together=256, tokens_alone=256)
    assert outcome.ratio == pytest.approx(3.0)
    assert "batched is 3.0 × as fast" in str(outcome)


def text_of(entry: Growing, ink: Ink) -> str:
    return "\n".join(strip.text.rstrip() for strip in entry.lines(ink))


def test_a_growing_answer_redraws_only_what_can_change() -> None:
    ink, entry = Ink(40, Style()), Growing()
    entry.grow("first **block**\n\nsecond")
    before = entry.lines(ink)
    entry.grow(" goes on")
    after = entry.lines(ink)
    assert text_of(entry, ink) == "first block\n\nsecond goes on▌"
    assert after[0] is before[0]
    assert after[2] is not before[2]


@pytest.mark.parametrize("step", [1, 7, 300])
def test_a_long_block_without_an_end_is_all_there(step: int) -> None:
    ink, entry = Ink(30, Style()), Growing()
    words = " ".join(f"word{n}" for n in range(400))
    for at in range(0, len(words), step):
        entry.grow(words[at : at + step])
        if at % 50 < step:
            entry.lines(ink)
    assert text_of(entry, ink).replace("▌", "").split() == words.split()
    wider = Ink(60, Style())
    assert text_of(entry, wider).replace("▌", "").split() == words.split()
    assert max(strip.cell_length for strip in entry.lines(wider)) > 30


@pytest.mark.parametrize("tail", ["", "last *words*", "```\nx\n", "word " * 400])
def test_what_was_rendered_stays_and_looks_like_any_answer(tail: str) -> None:
    ink, entry = Ink(40, Style()), Growing()
    text = "# one\n\n* a\n* b\n\n" + tail
    for at in range(0, len(text), 9):
        entry.grow(text[at : at + 9])
        first = entry.lines(ink)[0]
    message = Message(7, None, "assistant", text)
    entry.finish(message)
    assert entry.lines(ink)[0] is first
    assert entry.message is message
    whole = Answer(message)
    assert [s.text for s in entry.lines(ink)] == [s.text for s in whole.lines(ink)]
    entry.finish(message, "2/2")
    assert entry.lines(ink)[0].text == "‹2/2›"


def test_a_code_block_that_ends_becomes_markdown() -> None:
    ink, entry = Ink(30, Style()), Growing()
    entry.grow("```\n" + "x = 1\n" * 300)
    assert "```" in text_of(entry, ink)
    entry.grow("```\n\nafter")
    shown = text_of(entry, ink)
    assert "```" not in shown
    assert shown.count("x = 1") == 300
    assert shown.endswith("after▌")
