"""Adapters in the engine: what streams with them, what waits, what is refused, what is shared."""

import random
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kvrun.errors import BadCheckpoint, InvalidRequest, KvrunError, NotFound, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine
from kvrun.runtime.engine.request import AdapterInfo, Delta, Request
from kvrun.runtime.engine.start import start
from kvrun.runtime.lora.bank import LoraBank
from kvrun.runtime.sampling.params import SamplingParams
from tests.runtime.engine.scripted import check_pages
from tests.runtime.lora.adapters import edit, write
from tests.runtime.lora.conftest import RANKS, SHAPES

Make = Callable[..., EngineConfig]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
CHOICES: list[Any] = [
    *RANKS, None, [("one", 0.5), ("eight", -2.0)], [("four", 3.0)], [("four", 1.0)]
]  # fmt: skip


def ask(number: int, adapter: Any, prompt: list[int] | None = None, **params: Any) -> Request:
    source = random.Random(number)
    ids = prompt or [source.randrange(96) for _ in range(source.randint(2, 30))]
    options = SamplingParams(**{"max_tokens": 12, "temperature": 0, "ignore_eos": True, **params})
    return Request(id=str(number), prompt_ids=ids, params=options, adapter=adapter)


def run(engine: Engine, requests: Iterable[Request] = (), every: int = 1) -> dict[str, list[int]]:
    """The tokens of every request; one joins every `every` steps, 0: all at once."""
    found, ends, _ = stream(engine, requests, every)
    assert set(ends.values()) <= {"length"}, ends
    return found


def stream(
    engine: Engine, requests: Iterable[Request] = (), every: int = 1
) -> tuple[dict[str, list[int]], dict[str, str], dict[str, Delta]]:
    """Tokens and finish reasons, and the last delta of each."""
    waiting, found, ends, last, steps = list(requests), {}, {}, {}, 0
    while waiting or not engine.idle:
        while waiting and (not every or steps % every == 0):
            engine.add(waiting.pop(0))
            if every:
                break
        for delta in engine.step():
            last[delta.request_id] = delta
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason:
                ends[delta.request_id] = delta.finish_reason
        check_pages(engine)
        steps += 1
    check_bank(engine)
    return found, ends, last


def check_bank(engine: Engine) -> None:
    """Nobody uses an adapter any more, and every slot is free or has an adapter."""
    bank = bank_of(engine)
    resident = bank.resident
    assert all(not a.users and not a.pins for a in [*bank.adapters, *resident._placed])
    assert len(resident._free) + len(resident._placed) == len(resident.table) - 1


def bank_of(engine: Engine) -> LoraBank:
    assert engine._bank
    return engine._bank


def load(engine: Engine, name: str, path: str) -> AdapterInfo:
    loading = engine.load_adapter(name, path)
    while not loading.done():
        engine.step()
    return loading.result()


def infos(engine: Engine) -> dict[str, AdapterInfo]:
    return {info.name: info for info in engine.adapters()}


@pytest.fixture(scope="module")
def alone() -> Any:
    """What a request says alone in an engine: answers that the tests share."""
    return {}


def expected(make: Make, requests: list[Request], known: dict[Any, Any]) -> dict[str, list[int]]:
    engine = None
    for request in requests:
        key = str(request.prompt_ids), str(request.adapter), request.params.max_tokens
        if key not in known:
            engine = engine or start(make(prefix_caching=False))
            known[key] = run(engine, [request])[request.id]
    return {r.id: known[str(r.prompt_ids), str(r.adapter), r.params.max_tokens] for r in requests}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"run_ahead": 2},
        {"prefix_caching": False, "max_num_batched_tokens": 7},
        {"kv_memory": 60 * 2 * 2 * 16 * 4 * 4, "max_model_len": 64},
        {"max_num_seqs": 3, "run_ahead": 1},
    ],
    ids=["plain", "ahead", "chunks", "preempted", "few places"],
)
def test_each_request_answers_as_it_does_alone(config: Make, alone: Any, options: Any) -> None:
    requests = [ask(n, CHOICES[n % len(CHOICES)]) for n in range(24)]
    engine = start(config(**options))
    assert run(engine, requests) == expected(config, requests, alone)
    answers = run(engine, [ask(100 + n, c, [1, 2, 3, 4, 5]) for n, c in enumerate(CHOICES)], 0)
    assert answers["103"] != answers["104"]  # an adapter is not the base
    assert len({tuple(answer) for answer in answers.values()}) >= 6
    assert ("kv_memory" in options) == (engine.stats().preemptions > 0)


def test_choices_and_sampling_with_an_adapter(config: Make) -> None:
    engine = start(config())
    request = ask(0, "eight", n=3, temperature=1.0, seed=7)
    found: dict[int, list[int]] = {}
    engine.add(request)
    while not engine.idle:
        for delta in engine.step():
            found.setdefault(delta.index, []).extend(delta.token_ids)
    assert len(found) == 3
    alone: list[list[int]] = []
    for _ in range(2):
        single = ask(1, "eight", list(request.prompt_ids), temperature=1.0, seed=7)
        alone.append(run(start(config()), [single])["1"])
    assert alone == [found[0], found[0]]


# -- A1: an adapter that is missing, of a wrong rank, for another base, with NaN --------------


def broken(kind: str, folder: Path) -> Path:
    write(folder, SHAPES)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if kind == "missing":
        shutil.rmtree(folder)
    elif kind == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif kind == "truncated":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
    elif kind == "rank":
        edit(folder, r=3)
    elif kind == "base":
        edit(folder, lambda t: {**t, first: t[first][:, :-1]})
    elif kind == "nan":
        edit(folder, lambda t: {**t, first: t[first] * float("nan")})
    elif kind == "type":
        edit(folder, peft_type="LOHA")
    elif kind == "unknown matrix":
        edit(folder, lambda t: {n.replace("q_proj", "z_proj"): v for n, v in t.items()})
    return folder


BROKEN: dict[str, tuple[type[KvrunError], str]] = {
    "missing": (NotFound, "holds no adapter_config.json"),
    "no weights": (NotFound, "adapter_model.safetensors"),
    "truncated": (BadCheckpoint, "truncated"),
    "rank": (BadCheckpoint, "has rank 4, adapter_config.json says 3"),
    "base": (BadCheckpoint, r"A is \[4, 31\]"),
    "nan": (BadCheckpoint, "not finite"),
    "type": (Unsupported, "LOHA"),
    "unknown matrix": (Unsupported, "z_proj"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a1_loading_fails_alone(config: Make, alone: Any, kind: str, tmp_path: Path) -> None:
    engine = start(config())
    requests = [ask(n, CHOICES[n % len(CHOICES)]) for n in range(6)]
    wanted = expected(config, requests, alone)
    for request in requests:
        engine.add(request)
    before = list(infos(engine))
    loading = engine.load_adapter("new", str(broken(kind, tmp_path / "new")))
    again = engine.load_adapter("four", str(tmp_path / "new"))
    assert run(engine) == wanted
    error, words = BROKEN[kind]
    for future in (loading, again):
        with pytest.raises(error) as caught:
            future.result(timeout=0)
        assert re.search(words, str(caught.value)), str(caught.value)
    assert list(infos(engine)) == before
    with pytest.raises(InvalidRequest, match="there is no adapter 'new'"):
        engine.add(ask(50, "new"))
    assert run(engine, [ask(3, "sixteen")]) == {"3": wanted["3"]}


@pytest.mark.parametrize("kind", ["nan", "truncated"])
def test_a1_found_when_it_is_wanted(config: Make, alone: Any, kind: str, tmp_path: Path) -> None:
    """An adapter that went bad after the start fails its own requests, with the reason."""
    folder = tmp_path / "bad"
    write(folder, SHAPES)
    engine = start(config(adapters={**config().adapters, "bad": str(folder)}))
    broken(kind, folder)
    requests = [ask(n, CHOICES[n % len(CHOICES)]) for n in range(6)]
    wanted = expected(config, requests, alone)
    found, ends, last = stream(engine, [*requests[:3], ask(60, "bad"), *requests[3:]], 0)
    assert ends.pop("60") == "error"
    assert "bad" in (last["60"].error or "")
    assert found.pop("60") == []
    assert found == wanted
    assert infos(engine)["bad"].state == "failed"
    assert infos(engine)["bad"].error


def test_a1_an_unknown_adapter_is_never_the_base(config: Make) -> None:
    engine = start(config())
    for choice in ("nothing", [("four", 1.0), ("nothing", 1.0)], [], [("four", float("nan"))]):
        with pytest.raises(InvalidRequest) as caught:
            engine.add(ask(0, choice))
        if "nothing" in str(choice):
            assert "known: one, four, eight, sixteen" in str(caught.value)
    assert engine.idle


# -- A2: more adapters than room -------------------------------------------------------------


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a2_capacity_one_never_mixes(config: Make, alone: Any, run_ahead: int) -> None:
    requests = [ask(n, CHOICES[n % len(CHOICES)]) for n in range(32)]
    wanted = expected(config, requests, alone)
    engine = start(config())
    largest = max(info.bytes for info in engine.adapters())
    engine = start(config(lora_memory=largest, run_ahead=run_ahead))
    seen: set[int] = set()
    waiting = list(requests)
    found: dict[str, list[int]] = {}
    while waiting or not engine.idle:
        if waiting:
            engine.add(waiting.pop(0))
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
        resident = bank_of(engine).resident
        assert sum(a.bytes for a in resident._placed) <= largest
        for sequence in engine.scheduler.running:
            # What a running sequence names is there, and nobody has taken its place.
            adapter = sequence.adapter
            assert adapter is None or resident._in_slot[adapter.slot] is adapter
            seen.add(len({s.adapter for s in engine.scheduler.running if s.adapter}))
    assert found == wanted
    assert bank_of(engine).resident.copies >= 6
    check_bank(engine)


def test_a2_everyone_gets_a_turn(config: Make) -> None:
    """A stream of requests for the adapter that is there does not keep the other one out."""
    size = max(info.bytes for info in start(config()).adapters())
    engine = start(config(lora_memory=size))
    engine.add(ask(0, "sixteen", max_tokens=20))
    engine.step()
    engine.add(ask(1, "eight"))
    number, done = 2, False
    while not done:
        engine.add(ask(number, "sixteen", max_tokens=4))
        number += 1
        done = any(d.request_id == "1" and d.finish_reason for d in engine.step())
        assert number < 200
    run(engine)


def test_a_base_request_passes_one_that_waits_for_its_adapter(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(config())
    bank = bank_of(engine)
    held: list[Any] = []
    submit = bank._pool.submit
    monkeypatch.setattr(bank._pool, "submit", lambda work: _Held(held, submit, work))
    engine.add(ask(0, "four"))
    engine.add(ask(1, None))
    engine.add(ask(2, "eight"))
    found: dict[str, str] = {}
    while "1" not in found:
        found |= {d.request_id: d.finish_reason for d in engine.step() if d.finish_reason}
    assert found == {"1": "length"}
    assert engine.stats().waiting == 2
    engine.abort("2")
    assert [d.finish_reason for d in engine.step()] == ["abort"]
    for future in held:
        future.go()
    assert list(run(engine)) == ["0"]


class _Held:
    """A future whose work begins when it is told to."""

    def __init__(self, held: list[Any], submit: Any, work: Any) -> None:
        held.append(self)
        self._submit, self._work, self._future = submit, work, None
        self._condition, self._waiters = threading.Condition(), []
        self._state = "PENDING"

    def go(self) -> None:
        self._future = self._submit(self._work)
        self._future.exception()

    def done(self) -> bool:
        return self._future is not None

    def result(self) -> Any:
        assert self._future
        return self._future.result()


# -- A3: a folder that is replaced while it is used ----------------------------------------------


def test_a3_running_requests_keep_the_old_one(config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "swap"
    write(folder, SHAPES, seed=11)
    copies = [tmp_path / "old", tmp_path / "new"]
    shutil.copytree(folder, copies[0])
    write(copies[1], SHAPES, seed=12)
    prompt = list(range(1, 18))
    options: Any = {"adapters": {"swap": str(folder)}}
    long = {"max_tokens": 24}
    answers = [
        run(start(config(adapters={"swap": str(copy)})), [ask(0, "swap", prompt, **long)])["0"]
        for copy in copies
    ]
    assert answers[0] != answers[1]
    engine = start(config(**options))
    engine.add(ask(0, "swap", prompt, **long))
    tokens: list[int] = []
    while len(tokens) < 5:
        tokens += [i for d in engine.step() for i in d.token_ids]
    write(folder, SHAPES, seed=12)
    loading = engine.load_adapter("swap", str(folder))
    while not loading.done():
        tokens += [i for d in engine.step() for i in d.token_ids]
    engine.add(ask(1, "swap", prompt, **long))
    engine.add(ask(2, "swap", prompt, **long))
    found, _, last = stream(engine)
    assert tokens + found.get("0", []) == answers[0]  # it may have ended while the new one came
    assert found["1"] == found["2"] == answers[1]
    # The new one found nothing of the old one's in the prefix cache; the old name is one adapter.
    assert len(infos(engine)) == 1
    again, _, _ = stream(engine, [ask(3, "swap", prompt, **long)])
    assert again["3"] == answers[1]
    assert last["1"].error is None
    assert len(bank_of(engine).resident._placed) == 1


def test_a3_the_prefix_belongs_to_the_content(config: Make, adapters: Any, tmp_path: Path) -> None:
    engine = start(config())
    prompt = list(range(1, 18))

    def cached(number: int, adapter: Any) -> int:
        engine.add(ask(number, adapter, prompt))
        first = []
        while not engine.idle:
            first += engine.step()
        return first[0].cached_tokens

    assert [cached(0, None), cached(1, "four"), cached(2, "eight")] == [0, 0, 0]
    assert [cached(3, None), cached(4, "four"), cached(5, "eight")] == [16, 16, 16]
    shutil.copytree(adapters["four"], tmp_path / "same")
    load(engine, "other name", str(tmp_path / "same"))
    assert cached(6, "other name") == 16
    write(tmp_path / "same", SHAPES, 4, alpha=8, seed=99)
    load(engine, "four", str(tmp_path / "same"))
    assert cached(7, "four") == 0
    assert cached(8, [("eight", 2.0)]) == 0
    assert cached(9, [("eight", 2.0)]) == 16
    assert cached(10, [("eight", 1.0)]) == 16


# -- load and unload -------------------------------------------------------------------------------


def test_unload_in_use_is_refused_and_nothing_changes(config: Make, alone: Any) -> None:
    engine = start(config())
    requests = [ask(0, "four"), ask(1, [("four", 0.5), ("one", 1.0)]), ask(2, None)]
    wanted = expected(config, [ask(0, "four"), ask(1, requests[1].adapter), ask(2, None)], alone)
    for request in requests:
        engine.add(request)
    with pytest.raises(InvalidRequest, match="in use by 2"):
        engine.unload_adapter("four")
    assert infos(engine)["four"].running == 2
    assert run(engine) == wanted
    assert infos(engine)["four"].running == 0
    engine.unload_adapter("four")
    for choice in ("four", [("four", 0.5), ("one", 1.0)]):
        with pytest.raises(InvalidRequest, match="there is no adapter 'four'"):
            engine.add(ask(3, choice))
    with pytest.raises(InvalidRequest, match="known: one, eight, sixteen"):
        engine.unload_adapter("four")
    assert bank_of(engine)._blends == {}


def test_infos_say_what_is_where(config: Make, adapters: dict[str, str]) -> None:
    engine = start(config(adapters={}))
    assert engine.adapters() == []
    info = load(engine, "mine", adapters["eight"])
    assert (info.name, info.path, info.ranks) == ("mine", adapters["eight"], [8])
    assert info.state == "host"
    assert info.bytes == 4 * 8 * sum(map(sum, SHAPES.values()))
    assert (info.load_seconds or 0) > 0
    run(engine, [ask(0, "mine")])
    assert infos(engine)["mine"].state == "device"
    with pytest.raises(InvalidRequest, match="no name for an adapter"):
        load(engine, "", adapters["eight"])
    with pytest.raises(Unsupported, match="larger lora_memory"):
        start(config(lora_memory=1000))
    random_one = load(engine, "random", "dummy:8:1:q_proj,v_proj")
    assert random_one.bytes == 4 * 8 * 2 * (2 * 32 + 16 + 32)
    assert run(engine, [ask(0, [("random", 1e4)])]) != run(engine, [ask(0, None)])
