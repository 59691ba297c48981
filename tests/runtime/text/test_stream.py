"""TextStream: what is pushed in pieces equals what is decoded at once (H11, H12)."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from tokenizers import Tokenizer

from kvrun.runtime.text import Text, TextStream

KINDS = ("byte_level", "byte_fallback", "metaspace", "word_level")
Open = Callable[[str], Text]
relaxed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def open_text(toys: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Open:
    @cache
    def make(kind: str) -> Text:
        folder: Path = tmp_path_factory.mktemp(kind)
        toys[kind].save(str(folder / "tokenizer.json"))
        return Text(folder)

    return make


def vocabulary(kind: str) -> st.SearchStrategy[int]:
    """Ids of any kind; byte tokens and halves of characters often."""
    sizes = {"byte_level": 344, "byte_fallback": 314, "metaspace": 54, "word_level": 11}
    anything = st.integers(0, sizes[kind] + 2)
    return anything | st.integers(8, 263) if kind == "byte_fallback" else anything


def pushed(stream: TextStream, ids: list[int], cuts: list[int]) -> list[str]:
    """The pieces that come out when `ids` go in cut at `cuts`."""
    edges = [0, *sorted({min(cut, len(ids)) for cut in cuts}), len(ids)]
    pieces = [stream.push(ids[a:b]) for a, b in pairwise(edges)]
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip_special", [True, False])
@given(data=st.data())
@relaxed
def test_h12_pieces_joined_are_the_whole(
    open_text: Open, kind: str, skip_special: bool, data: st.DataObject
) -> None:
    text = open_text(kind)
    ids = data.draw(st.lists(vocabulary(kind), max_size=24))
    cuts = data.draw(st.lists(st.integers(0, 24), max_size=24))
    whole = text.decode(ids, skip_special)
    stream = text.stream(skip_special=skip_special)
    assert "".join(pushed(stream, ids, cuts)) == whole
    assert stream.tokens_used == len(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@relaxed
def test_what_is_out_and_what_is_whole_are_the_text_so_far(
    open_text: Open, kind: str, data: st.DataObject
) -> None:
    text = open_text(kind)
    stream, out = text.stream(skip_special=False), ""
    ids = data.draw(st.lists(vocabulary(kind), max_size=24))
    for end, token in enumerate(ids, 1):
        out += stream.push([token])
        whole = text.decode(ids[:end], skip_special=False).rstrip("\ufffd")
        assert len(out.rstrip("\ufffd")) <= len(whole) <= len(out) + stream.unsettled
    assert not stream.stopped


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@given(text=st.text(st.sampled_from("aé雪😀 h\n☃e\u200d👩"), max_size=16))
@relaxed
def test_h12_split_characters_never_show(open_text: Open, kind: str, text: str) -> None:
    model = open_text(kind)
    ids = model.encode(text)
    stream = model.stream()
    pieces = [stream.push([token]) for token in ids] + [stream.finish()]
    assert "".join(pieces) == model.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_h12_an_unfinished_character_comes_out_at_the_end(open_text: Open) -> None:
    model = open_text("byte_level")
    ids = model.encode("😀")
    assert len(ids) == 4
    stream = model.stream()
    assert [stream.push([token]) for token in ids[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_text_before_an_unfinished_character_is_not_held_back(open_text: Open) -> None:
    model = open_text("byte_level")
    stream = model.stream()
    ids = model.encode("a😀")
    assert stream.push(ids[:2]) == "a"
    assert stream.push(ids[2:]) == "😀"


@pytest.mark.parametrize("kind", ["byte_fallback", "metaspace"])
def test_spaces_between_words_and_none_in_front(open_text: Open, kind: str) -> None:
    model = open_text(kind)
    stream = model.stream()
    pieces = [stream.push([token]) for token in model.encode("hello wor hello")]
    assert "".join(pieces) == "hello wor hello"
    assert pieces[0] == "hello" or kind == "byte_fallback"


def test_a_token_without_text_is_no_beginning(open_text: Open, toys: dict[str, Tokenizer]) -> None:
    """The decoder takes a space away at the beginning, and only there."""
    model, empty = open_text("byte_fallback"), toys["byte_fallback"].token_to_id("")
    ids = [*model.encode("hello"), empty, empty, *model.encode("wor")]
    stream = model.stream()
    pieces = [stream.push([token]) for token in ids]
    assert "".join([*pieces, stream.finish()]) == model.decode(ids) == "hello wor"


def first_stop(text: Text, ids: list[int], stops: list[str]) -> tuple[str, int, str | None]:
    """Text, tokens used and stop string, found naively: decode all again after every token."""
    for count in range(1, len(ids) + 1):
        sure = text.decode(ids[:count])
        if count < len(ids) and sure.endswith("\ufffd"):
            sure = sure[:-1]
        for end in range(len(sure) + 1):
            ending = [stop for stop in stops if sure[:end].endswith(stop)]
            if ending:
                longest = max(ending, key=len)
                return sure[: end - len(longest)], count, longest
    return text.decode(ids), len(ids), None


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@relaxed
def test_h11_stop_strings_against_a_naive_search(
    open_text: Open, kind: str, data: st.DataObject
) -> None:
    text = open_text(kind)
    ids = data.draw(st.lists(vocabulary(kind), min_size=1, max_size=20))
    whole = text.decode(ids).replace("\ufffd", "")
    slices = st.tuples(st.integers(0, len(whole)), st.integers(1, 5)).map(
        lambda cut: whole[cut[0] : cut[0] + cut[1]]
    )
    stops = [s for s in data.draw(st.lists(slices | st.just("el"), min_size=1, max_size=4)) if s]
    cuts = data.draw(st.lists(st.integers(0, 20), max_size=20))
    expected, used, reason = first_stop(text, ids, stops)
    stream = text.stream(stop=stops)
    pieces = pushed(stream, ids, cuts)
    assert "".join(pieces) == expected
    assert (stream.tokens_used, stream.stop_reason) == (used, reason)
    assert stream.stopped == (reason is not None)
    kept = text.stream(stop=stops, include_stop=True)
    assert "".join(pushed(kept, ids, cuts)) == expected + (reason or "")


def spelled(model: Text, text: str) -> list[int]:
    """One token per character."""
    return [token for char in text for token in model.encode(char)]


@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason", "used"),
    [
        ("abcSTOPdef", ["STOP"], "abc", "STOP", 7),
        ("abcSTOdef", ["STOP"], "abcSTOdef", None, 9),
        ("abcd", ["bc", "abcd"], "a", "bc", 3),  # the one that ends first
        ("abcd", ["abc", "c", "bc"], "", "abc", 3),  # of those the longest
        ("abc", ["ab", "abc"], "", "ab", 2),  # one the beginning of another
        ("aaab", ["aab"], "a", "aab", 4),  # begins again inside its own beginning
        ("abab", ["abb"], "abab", None, 4),
    ],
)
def test_h11_by_hand(
    open_text: Open, text: str, stops: list[str], expected: str, reason: str | None, used: int
) -> None:
    model = open_text("byte_level")
    stream = model.stream(stop=stops)
    assert "".join(pushed(stream, spelled(model, text), [])) == expected
    assert (stream.stop_reason, stream.tokens_used) == (reason, used)


def test_h11_a_partial_stop_is_never_shown(open_text: Open) -> None:
    model = open_text("byte_level")
    stream = model.stream(stop=["STOP"])
    shown = [stream.push([token]) for token in spelled(model, "xSTOySTOP")]
    assert shown == ["x", "", "", "", "STOy", "", "", "", ""]
    assert stream.push(model.encode("more")) == ""
    assert stream.finish() == ""
    assert stream.tokens_used == 9


def test_a_partial_stop_comes_out_at_the_end(open_text: Open) -> None:
    model = open_text("byte_level")
    stream = model.stream(stop="STOP")
    assert stream.push(spelled(model, "xSTO")) == "x"
    assert stream.finish() == "STO"


def test_a_stop_inside_a_run_of_byte_tokens_ends_at_once(open_text: Open) -> None:
    model = open_text("byte_fallback")
    newline = model.encode("\n")[-1]
    stream = model.stream(stop="\n\n")
    ids = [*model.encode("hello"), newline, newline, newline]
    assert stream.push(ids) == "hello"
    assert (stream.stopped, stream.tokens_used) == (True, len(ids) - 1)


def test_special_tokens_give_no_text(open_text: Open) -> None:
    model = open_text("byte_level")
    ids = model.encode("hello<|end|> world<tool_call>")
    stream = model.stream()
    assert stream.push(ids) + stream.finish() == "hello world<tool_call>"
    assert stream.tokens_used == len(ids)
    shown = model.stream(skip_special=False)
    assert shown.push(ids) + shown.finish() == "hello<|end|> world<tool_call>"
