"""The step loop on a scripted runner: batching, preemption, prefixes, aborts, steps in flight."""

import pytest

from kvrun.errors import EngineDead, InvalidRequest
from kvrun.runtime.engine.request import Delta
from kvrun.runtime.engine.scheduler import Row
from tests.runtime.engine.scripted import (
    EOS,
    ask,
    check_pages,
    drain,
    prompts,
    reference,
    scripted_engine,
)

RUN_AHEAD = [0, 1, 2, 3]


def expected(texts: list[list[int]], max_tokens: int = 8) -> dict[tuple[str, int], list[int]]:
    params = ask(0, [1], max_tokens).params
    return {(f"r{i}", 0): reference(text, params) for i, text in enumerate(texts)}


def tokens_of(
    found: dict[tuple[str, int], tuple[list[int], str]],
) -> dict[tuple[str, int], list[int]]:
    return {key: tokens for key, (tokens, _) in found.items()}


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_batched_output_is_each_request_alone(run_ahead: int, prefix_caching: bool) -> None:
    engine, runner = scripted_engine(run_ahead=run_ahead, prefix_caching=prefix_caching)
    texts = prompts(seed=1, count=24)
    for i, text in enumerate(texts):
        engine.add(ask(i, text))
    assert tokens_of(drain(engine)) == expected(texts)
    assert runner.max_rows > 4
    assert runner.chunks > 0


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_E1_pool_exhaustion_preempts_and_changes_nothing(run_ahead: int) -> None:
    texts = prompts(seed=2, count=16, low=6, high=20)
    longest = max(map(len, texts)) + 20
    engine, _ = scripted_engine(blocks=int(longest * 1.2) // 4 + 1, run_ahead=run_ahead)
    for i, text in enumerate(texts):
        engine.add(ask(i, text, max_tokens=20))
    assert tokens_of(drain(engine)) == expected(texts, 20)
    assert engine.stats().preemptions > 0


def test_E2_a_request_larger_than_the_pool_is_refused() -> None:
    engine, _ = scripted_engine(blocks=4)
    with pytest.raises(InvalidRequest, match="16 tokens"):
        engine.add(ask(0, [1] * 16))
    with pytest.raises(InvalidRequest, match="max_tokens=9"):
        engine.add(ask(1, [1] * 8, max_tokens=9))
    with pytest.raises(InvalidRequest, match="empty"):
        engine.add(ask(2, []))
    with pytest.raises(InvalidRequest, match="vocabulary"):
        engine.add(ask(3, [50]))
    with pytest.raises(InvalidRequest, match="logit_bias"):
        engine.add(ask(4, [1], logit_bias={50: 1.0}))
    assert engine.idle


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_end_of_text_in_flight(run_ahead: int) -> None:
    """Steps submitted past an end of text leave no trace: not in the tokens, not in the pages."""
    engine, runner = scripted_engine(run_ahead=run_ahead, blocks=40)
    texts = prompts(seed=3, count=40)
    for i, text in enumerate(texts):
        engine.add(ask(i, text, max_tokens=40))
    found = drain(engine)
    assert tokens_of(found) == expected(texts, 40)
    stopped = [tokens for tokens, reason in found.values() if reason == "stop"]
    assert len(stopped) > 5
    assert all(tokens[-1] == EOS for tokens in stopped)
    assert engine.stats().generated_tokens == sum(len(t) for t, _ in found.values())
    assert runner.submitted > 0


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_prefix_hits(run_ahead: int) -> None:
    engine, _ = scripted_engine(run_ahead=run_ahead)
    shared = prompts(seed=4, count=1, low=17, high=17)[0]
    engine.add(ask(0, shared))
    drain(engine)
    texts = [[*shared, 1], [*shared, 2], shared[:9], shared[:8]]
    for i, text in enumerate(texts):
        engine.add(ask(i, text))
    first: dict[str, Delta] = {}
    found: dict[str, list[int]] = {}
    while not engine.idle:
        for delta in engine.step():
            first.setdefault(delta.request_id, delta)
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    # Whole blocks of 4, and at least one token is always computed.
    assert [first[f"r{i}"].cached_tokens for i in range(4)] == [16, 16, 8, 4]
    assert found == {key: tokens for (key, _), tokens in expected(texts).items()}
    assert engine.stats().prefix_hit_tokens == 44


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_share_the_prompt(run_ahead: int, prefix_caching: bool) -> None:
    engine, _ = scripted_engine(run_ahead=run_ahead, prefix_caching=prefix_caching)
    text = prompts(seed=6, count=1, low=14, high=14)[0]
    request = ask(0, text, n=4)
    engine.add(request)
    found = drain(engine)
    assert tokens_of(found) == {
        ("r0", index): reference(text, request.params, index) for index in range(4)
    }
    # 14 prompt tokens once, and for each further choice only those behind the last full block.
    assert engine.stats().prompt_tokens == 14 + 3 * 2


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_share_the_prompt_although_the_first_has_left(prefix_caching: bool) -> None:
    engine, _ = scripted_engine(prefix_caching=prefix_caching, max_num_batched_tokens=8)
    text = prompts(seed=6, count=1, low=30, high=30)[0]
    request = ask(0, text, n=4)
    engine.add(request)
    engine.step()
    engine.abort("r0", 0)
    found = drain(engine)
    assert found.pop(("r0", 0)) == ([], "abort")
    assert tokens_of(found) == {
        ("r0", index): reference(text, request.params, index) for index in (1, 2, 3)
    }
    # The first chunk of 8, then the prompt once, then what lies behind the last full block.
    assert engine.stats().prompt_tokens == 8 + 30 + 2 * 2


def test_an_interrupted_step_is_as_if_it_had_not_been() -> None:
    engine, runner = scripted_engine()
    texts = prompts(seed=13, count=6)
    for i, text in enumerate(texts):
        engine.add(ask(i, text))
    deltas = engine.step()

    def interrupt(row: Row) -> None:
        raise KeyboardInterrupt

    runner.poison = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    runner.poison = lambda row: None
    assert tokens_of(drain(engine, deltas)) == expected(texts)


def test_no_more_sequences_than_a_step_has_tokens() -> None:
    engine, runner = scripted_engine(max_num_batched_tokens=3, max_num_seqs=16)
    texts = prompts(seed=14, count=8)
    for i, text in enumerate(texts):
        engine.add(ask(i, text))
    deltas = []
    for _ in range(20):
        deltas += engine.step()
        assert len(engine.scheduler.running) <= 3, "each of them can decode in each step"
    assert tokens_of(drain(engine, deltas)) == expected(texts)
    assert runner.max_rows == 3


def test_cached_tokens_are_counted_once_for_a_preempted_prompt() -> None:
    engine, _ = scripted_engine(blocks=8, max_num_batched_tokens=4)
    head = prompts(seed=15, count=1, low=9, high=9)[0]
    engine.add(ask(0, head, max_tokens=2))
    drain(engine)
    for i in range(1, 4):
        engine.add(ask(i, [*head, i, i, i], max_tokens=12, ignore_eos=True))
    drain(engine)
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hit_tokens == 3 * 8


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_in_any_state(run_ahead: int, steps: int) -> None:
    engine, _ = scripted_engine(run_ahead=run_ahead, max_num_seqs=2, blocks=16)
    texts = prompts(seed=7, count=5, low=5, high=30)
    for i, text in enumerate(texts):
        engine.add(ask(i, text, max_tokens=30, ignore_eos=True))
    ends = []
    for _ in range(steps):
        ends += [d for d in engine.step() if d.finish_reason]
    for i in (0, 1, 3):
        engine.abort(f"r{i}")
    engine.abort("nobody")
    found = {key[0]: value for key, value in drain(engine).items()}
    assert not ends
    assert {key: reason for key, (_, reason) in found.items()} == {
        "r0": "abort", "r1": "abort", "r3": "abort", "r2": "length", "r4": "length",
    }  # fmt: skip
    params = ask(0, [1], 30, ignore_eos=True).params
    assert all(found[f"r{i}"][0] == reference(texts[i], params) for i in (2, 4))
    assert engine.stats().blocks_active == 0


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_penalties_wait_for_the_tokens_they_count(run_ahead: int) -> None:
    engine, runner = scripted_engine(run_ahead=run_ahead)
    ahead = set()

    def watch(row: Row) -> None:
        if row.start + row.count > len(row.sequence.tokens):
            ahead.add(row.sequence.request.id)

    runner.poison = watch
    texts = prompts(seed=12, count=2)
    engine.add(ask(0, texts[0], ignore_eos=True, frequency_penalty=0.5))
    engine.add(ask(1, texts[1], ignore_eos=True))
    drain(engine)
    assert ahead == ({"r1"} if run_ahead else set())


def test_min_tokens_and_stop_ids() -> None:
    engine, _ = scripted_engine()
    text = prompts(seed=3, count=1)[0]
    full = reference(text, ask(0, text, 30, ignore_eos=True).params)
    engine.add(ask(0, text, max_tokens=30, ignore_eos=True, stop_token_ids=(full[4],)))
    tokens, reason = drain(engine)["r0", 0]
    assert reason == "stop"
    assert tokens == full[: full.index(full[4]) + 1]


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_E3_one_poisoned_request_of_sixteen(run_ahead: int) -> None:
    engine, runner = scripted_engine(run_ahead=run_ahead, max_num_batched_tokens=64)
    texts = prompts(seed=8, count=16, low=2, high=4)

    def poison(row: Row) -> None:
        if row.sequence.request.id == "r5":
            raise ValueError("poisoned")

    for i, text in enumerate(texts):
        engine.add(ask(i, text))
    runner.poison = poison
    first = engine.step()
    assert runner.submitted <= (1 + 2 * 4 + 1) + run_ahead
    found = {key[0]: value for key, value in drain(engine, first).items()}
    assert found.pop("r5") == ([], "error")
    alone = {key: tokens for (key, _), tokens in expected(texts).items() if key != "r5"}
    assert {key: tokens for key, (tokens, _) in found.items()} == alone


def test_a_step_that_fails_once_is_retried() -> None:
    engine, runner = scripted_engine()
    failures = iter([True])

    def poison(row: Row) -> None:
        if next(failures, False):
            raise OSError("once")

    texts = prompts(seed=9, count=8)
    for i, text in enumerate(texts):
        engine.add(ask(i, text))
    runner.poison = poison
    assert tokens_of(drain(engine)) == expected(texts)


def test_E4_steps_that_always_fail_end_the_engine() -> None:
    engine, runner = scripted_engine()

    def broken(row: Row | None = None) -> None:
        raise RuntimeError("the device is gone")

    runner.poison, runner.probe = broken, broken  # type: ignore[method-assign]
    for i in range(3):
        engine.add(ask(i, [1, 2, 3]))
    for _ in range(2):
        assert engine.step() == []
        check_pages(engine)
    with pytest.raises(EngineDead, match="3 steps"):
        engine.step()


def test_a_poisoned_request_alone_does_not_end_the_engine() -> None:
    engine, runner = scripted_engine()

    def poison(row: Row) -> None:
        raise ValueError("poisoned")

    runner.poison = poison
    for i in range(5):
        engine.add(ask(i, [1, 2, 3]))
        assert drain(engine) == {(f"r{i}", 0): ([], "error")}
    runner.poison = lambda row: None
    engine.add(ask(9, [1, 2, 3]))
    assert tokens_of(drain(engine)) == {("r9", 0): reference([1, 2, 3], ask(0, [1]).params)}


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_an_engine_that_recovers_goes_on_where_it_was(run_ahead: int) -> None:
    engine, runner = scripted_engine(run_ahead=run_ahead)
    texts = prompts(seed=11, count=6)
    for i, text in enumerate(texts):
        engine.add(ask(i, text))
    deltas = [*engine.step(), *engine.step()]
    healthy = runner.poison, runner.probe

    def broken(row: Row | None = None) -> None:
        raise RuntimeError("the device is away")

    runner.poison, runner.probe = broken, broken  # type: ignore[method-assign]
    deltas += [*engine.step(), *engine.step()]
    runner.poison, runner.probe = healthy  # type: ignore[method-assign]
    assert tokens_of(drain(engine, deltas)) == expected(texts)
    assert engine.stats().failed_steps == 2


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_E7_not_finite_logits_end_one_request_and_cache_nothing(run_ahead: int) -> None:
    engine, runner = scripted_engine(run_ahead=run_ahead)
    texts = prompts(seed=10, count=3, low=9, high=12)
    runner.not_finite = lambda row: row.sequence.request.id == "r1" and row.start > 12
    for i, text in enumerate(texts):
        engine.add(ask(i, text, ignore_eos=True))
    found = drain(engine)
    good = 13 - len(texts[1]) + 1
    full = reference(texts[1], ask(0, [1], ignore_eos=True).params)
    assert found["r1", 0] == (full[:good], "error")
    assert all(found[f"r{i}", 0][1] in {"stop", "length"} for i in (0, 2))
    engine.add(ask(4, texts[1]))
    cached = []
    while not engine.idle:
        cached += [delta.cached_tokens for delta in engine.step()]
    assert cached[0] == 0


def test_a_request_id_cannot_run_twice() -> None:
    engine, _ = scripted_engine()
    engine.add(ask(0, [1]))
    with pytest.raises(InvalidRequest, match="'r0'"):
        engine.add(ask(0, [1]))
    drain(engine)
    engine.add(ask(0, [1]))


@pytest.mark.parametrize("run_ahead", [0, 4])
def test_several_turns_at_once_are_several_steps(run_ahead: int) -> None:
    engine, runner = scripted_engine(run_ahead=run_ahead, turns=4, max_num_batched_tokens=64)
    texts = prompts(6, 12)
    for number, text in enumerate(texts):
        engine.add(ask(number, text, 30))
    found = drain(engine)
    assert tokens_of(found) == expected(texts, 30)
    assert {reason for _, reason in found.values()} == {"stop", "length"}
    assert engine.stats().steps >= 30
    assert runner.submitted < engine.stats().steps / 1.8, "one look of the host for four steps"
    assert engine.stats().generated_tokens == sum(len(t) for t, _ in found.values())


def test_a_break_in_a_later_turn_keeps_what_came_before() -> None:
    engine, runner = scripted_engine(turns=4, max_num_batched_tokens=64)
    runner.not_finite = lambda row: row.start >= 11
    engine.add(ask(0, [1] * 8, 20, ignore_eos=True))
    whole = reference([1] * 8, ask(0, [1], 20, ignore_eos=True).params)
    (found,) = drain(engine).values()
    assert found == (whole[:4], "error")


@pytest.mark.parametrize("run_ahead", RUN_AHEAD)
def test_E5_steps_that_do_not_fit_into_memory_get_smaller(run_ahead: int) -> None:
    engine, runner = scripted_engine(max_num_batched_tokens=256, blocks=200, run_ahead=run_ahead)
    runner.room = 70
    texts = prompts(5, 12, 30, 60)
    for number, text in enumerate(texts):
        engine.add(ask(number, text))
    assert tokens_of(drain(engine)) == expected(texts)
    stats = engine.stats()
    assert stats.failed_steps >= 2
    assert stats.preemptions >= 2


def test_E5_a_request_that_never_fits_ends_alone() -> None:
    engine, runner = scripted_engine(max_num_batched_tokens=256, blocks=200)
    runner.room = 40  # less than the smallest step that is tried
    engine.add(ask(0, [1] * 90))
    engine.add(ask(1, [2] * 20))
    found = drain(engine)
    assert found["r0", 0][1] == "error"
    assert found["r1", 0][0] == reference([2] * 20, ask(1, [2]).params)
