"""SamplingParams: bounds with messages, texts to values, the pipe."""

import dataclasses
import math
from typing import Any

import msgspec
import pytest

from kvrun.errors import InvalidRequest
from kvrun.runtime.engine.request import Request
from kvrun.runtime.sampling.params import KINDS, SamplingParams, parse_option

WRONG: list[tuple[str, Any]] = [
    *[(name, value) for name in ("temperature", "top_p") for value in (math.nan, math.inf, -0.1)],
    ("temperature", True), ("temperature", "1"), ("temperature", None), ("temperature", 100.1),
    ("temperature", 10**400), ("top_p", 0), ("top_p", 1.0001), ("top_p", False),
    ("typical_p", 0), ("typical_p", 1.1), ("min_p", -1e-9), ("min_p", 1.1),
    ("top_k", -1), ("top_k", 1.0), ("top_k", True), ("top_k", 2**31),
    ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", 101),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("frequency_penalty", math.nan),
    ("seed", 2**64), ("seed", -(2**63) - 1), ("seed", 1.5), ("seed", 10**5000),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.0), ("min_tokens", -1),
    ("n", 0), ("n", 129), ("n", None), ("logprobs", -1), ("logprobs", 21),
    ("stop", [""]), ("stop", ["x"] * 17), ("stop", ["x" * 257]), ("stop", [1]), ("stop", 5),
    ("stop", ["\ud83d"]), ("stop", ""), ("stop_token_ids", [-1]), ("stop_token_ids", [True]),
    ("stop_token_ids", 3), ("stop_token_ids", [1.0]), ("stop_token_ids", list(range(129))),
    ("ignore_eos", 1), ("ignore_eos", "yes"), ("logit_bias", [1]), ("logit_bias", {"1": 1.0}),
    ("logit_bias", {-1: 1.0}), ("logit_bias", {1: 101.0}), ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: True}), ("logit_bias", dict.fromkeys(range(1025), 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), WRONG, ids=[f"{name}-{i}" for i, (name, _) in enumerate(WRONG)]
)
def test_a_value_out_of_bounds_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**{name: value})
    assert name in refused.value.what
    assert len(refused.value.what) < 200


def test_the_message_says_value_and_bound() -> None:
    with pytest.raises(InvalidRequest, match=r"top_p is 1\.5; it must be .*above 0, at most 1"):
        SamplingParams(top_p=1.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0), ("temperature", 100), ("top_p", 1), ("top_k", 0), ("seed", 2**64 - 1),
     ("seed", -(2**63)), ("n", 128), ("logprobs", 20), ("stop", ["x" * 256] * 16), ("min_p", 1)],
)  # fmt: skip
def test_the_ends_of_an_interval_belong_to_it(name: str, value: Any) -> None:
    got = getattr(SamplingParams(**{name: value}), name)
    assert got == (tuple(value) if isinstance(value, list) else value)


def test_values_are_stored_in_one_type() -> None:
    params = SamplingParams(temperature=1, stop="end", stop_token_ids=[1, 2], logit_bias={3: -1})
    assert type(params.temperature) is float
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert type(params.logit_bias[3]) is float if params.logit_bias else False


def test_min_tokens_beyond_max_tokens() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens is 5"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_ids_beyond_the_vocabulary() -> None:
    SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9]).check_vocabulary(10)
    for params in (SamplingParams(logit_bias={10: 1.0}), SamplingParams(stop_token_ids=[10])):
        with pytest.raises(InvalidRequest, match="token 10; the model has ids 0 to 9"):
            params.check_vocabulary(10)


def test_crosses_a_pipe_unchanged() -> None:
    params = SamplingParams(
        seed=2**64 - 1, stop=["a", "é"], logit_bias={5: 1.5}, stop_token_ids=(7,), logprobs=0
    )
    sent = msgspec.msgpack.encode(Request(id="r", prompt_ids=[1], params=params))
    assert msgspec.msgpack.decode(sent, type=Request).params == params


def test_a_pipe_does_not_carry_wrong_values() -> None:
    with pytest.raises(InvalidRequest):
        msgspec.json.decode(b'{"top_p": 2.0}', type=SamplingParams)


def test_options_describe_every_field() -> None:
    options = {option.name: option for option in SamplingParams.options()}
    assert list(options) == [field.name for field in dataclasses.fields(SamplingParams)]
    for option in options.values():
        assert option.type in KINDS
        assert option.help
        assert (option.bounds is not None) == (option.type in {"int", "float"})
        assert option.default == getattr(SamplingParams(), option.name)
        assert option.optional == (option.default is None)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [("temperature=0.7", "temperature", 0.7), ("top-k=5", "top_k", 5), ("seed=none", "seed", None),
     ("stop=a, b", "stop", ("a, b",)), ('stop=["a", "b"]', "stop", ("a", "b")),
     ("stop= x", "stop", (" x",)), ("ignore_eos=yes", "ignore_eos", True),
     ("ignore_eos=off", "ignore_eos", False), ("stop_token_ids=1, 2", "stop_token_ids", (1, 2)),
     ("logit_bias=5:-100,7:2.5", "logit_bias", {5: -100.0, 7: 2.5}),
     ("stop=a=b", "stop", ("a=b",))],
)  # fmt: skip
def test_options_written_as_text(text: str, name: str, value: Any) -> None:
    assert parse_option(text) == (name, value)


@pytest.mark.parametrize(
    "text",
    ["temperature", "temperature=warm", "top_k=1.5", "temperature=nan", "temperature=none",
     "stop=[1", "stop=[1]", "logit_bias=5", "logit_bias=5:x", "ignore_eos=maybe", "n="],
)  # fmt: skip
def test_text_that_is_no_value(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_option(text)


@pytest.mark.parametrize(
    ("text", "way"),
    [('logit_bias={"5": 1}', "5:-100,7:2.5"), ("stop_token_ids=a", "1,2,3"), ("stop=[1", '["a"')],
)
def test_how_a_value_is_written_is_said(text: str, way: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_option(text)
    assert way in refused.value.hint


def test_near_names() -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_option("temprature=1")
    assert "'temperature'" in refused.value.hint
    with pytest.raises(InvalidRequest) as refused:
        parse_option("colour=1")
    assert "top_p" in refused.value.hint


def test_from_strings_changes_only_what_is_given() -> None:
    base = SamplingParams(top_k=3, seed=1)
    params = SamplingParams.from_strings({"temperature": "0", "seed": "none"}, base)
    assert params == SamplingParams(top_k=3, temperature=0, seed=None)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams.from_strings({"min_tokens": "3"}, SamplingParams(max_tokens=2))
