"""The tests of a model on the built-in one: what is asked of the engine, and what is counted."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvrun.bench import measure, workloads
from kvrun.bench.limits import Limits
from kvrun.bench.measure import Case
from kvrun.bench.roofline import Ceilings
from kvrun.bench.shapes import SHAPES
from kvrun.bench.target import Target, find, parse_engine
from kvrun.errors import InvalidRequest, KvrunError, NotFound, Unsupported

LIMITS = Limits(Ceilings(1e12, 1e14), Ceilings(2e12, 2e14))


def quiet(text: str) -> None:
    pass


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[tuple[int, int], float]) -> list:
    """Let a run of (prompt length, new tokens) take so long; returns what was run."""
    ran = []

    def run(self: Target, prompts: Sequence[list[int]], new: Sequence[int]) -> float:
        assert len(prompts) == len(new)
        ran.append((len(prompts), len(prompts[0]), new[0]))
        return seconds.get((len(prompts[0]), new[0]), 1.0)

    monkeypatch.setattr(Target, "seconds", run)
    return ran


def test_cases_are_every_combination() -> None:
    found = measure.cases([4, 0], [8], [1, 2], [0, 16])
    assert [(c.name, c.batch) for c in found] == [
        ("pp4", 1), ("pp4", 2), ("pp4 @ d16", 1), ("pp4 @ d16", 2),
        ("tg8", 1), ("tg8", 2), ("tg8 @ d16", 1), ("tg8 @ d16", 2),
    ]  # fmt: skip
    assert [c.longest for c in found[::2]] == [8, 24, 17, 32]
    assert measure.cases([0], [0], [1], [0]) == []


def test_a_step_is_the_difference_of_two_runs(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = timed(monkeypatch, {(16, 8): 1.0, (16, 40): 1.0 + 32 * 0.25})
    [row] = measure.micro(tiny, [Case(0, 32, 2, 16)], 3, LIMITS, 1, quiet)
    assert ran == [(2, 16, 4)] + [(2, 16, 8), (2, 16, 40)] * 3
    assert row["median_ms"] == 250
    assert row["samples_ms"] == [250] * 3
    assert row["avg_ts"] == 8
    assert row["stddev_ts"] == 0
    work = tiny.cost.step(2, 16 + 8 + 16)
    assert row["gb_per_s"] == pytest.approx(work.bytes / 0.25 / 1e9)
    assert row["bound_ms"] == pytest.approx(1e3 * work.seconds(Ceilings(1e12, 1e14)))
    assert row["roofline_percent"] == pytest.approx(row["bound_ms"] / 2.5)
    assert row["datasheet_percent"] == pytest.approx(row["roofline_percent"] / 2)


def test_a_prompt_behind_others_is_what_it_takes_longer(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = timed(monkeypatch, {(24, 1): 0.75, (16, 1): 0.25})
    [row] = measure.micro(tiny, [Case(8, 0, 2, 16)], 1, Limits(), 1, quiet)
    assert ran == [(2, 24, 4), (2, 24, 1), (2, 16, 1)]
    assert row["avg_ts"] == 2 * 8 / 0.5
    assert row["bound_ms"] is None
    assert row["roofline_percent"] is None


def test_differences_below_zero_are_dropped_and_counted(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 5.0, 1.0, 2.0, 4.0])  # the run that does not count, then two pairs
    monkeypatch.setattr(Target, "seconds", lambda *_: next(times))
    [row] = measure.micro(tiny, [Case(0, 2, 1, 0)], 2, LIMITS, 1, quiet)
    assert (row["dropped"], row["samples_ms"]) == (1, [1000])
    timed(monkeypatch, {(1, 8): 2.0})
    with pytest.raises(KvrunError, match="below zero"):
        list(measure.micro(tiny, [Case(0, 2, 1, 0)], 2, LIMITS, 1, quiet))


def test_micro_on_a_model(tiny: Target) -> None:
    todo = measure.cases([8], [48], [1, 2], [0])
    rows = list(measure.micro(tiny, todo, 3, LIMITS, 1, quiet))
    assert [(row["test"], row["batch_size"]) for row in rows] == [
        ("pp8", 1), ("pp8", 2), ("tg48", 1), ("tg48", 2),
    ]  # fmt: skip
    for row in rows:
        assert row["avg_ts"] > 0
        assert len(row["samples_ms"]) == 3 - row["dropped"]
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]


def test_latency_on_a_model(tiny: Target) -> None:
    seen: list[list[int]] = []
    work = workloads.uniform(2, 8, 3)
    row = measure.latency(
        tiny, work, warm_ups=1, repetitions=2, limits=LIMITS, seed=5,
        watch=lambda text: seen.append([len(tiny.last)]),
    )  # fmt: skip
    assert len(seen) == 3
    assert len(row["latencies"]) == row["repetitions"] == 2
    assert row["output_throughput"] == pytest.approx(6 / (row["median_ms"] / 1e3))
    # The last prompts were those of seed 6.
    assert tiny.last[0].prompt_token_ids == [i % 4096 for i in workloads.fixed(2, 8, 6)[0]]
    assert row["roofline_percent"] > 0


def test_throughput_on_a_model(tiny: Target) -> None:
    lengths = [(5, 4), (9, 2), (3, 6), (4, 1), (6, 3), (8, 5)]
    prompts = [workloads.fixed(1, n, 1)[0] for n, _ in lengths]
    work = workloads.Workload("some", prompts, [n for _, n in lengths])
    row = measure.throughput(tiny, work, 2, LIMITS, quiet)
    assert (row["total_input_tokens"], row["total_output_tokens"]) == (35, 21)
    assert row["total_num_tokens"] == 56
    assert row["num_requests"] == 6
    assert len(row["samples_s"]) == 2
    assert row["output_throughput"] == pytest.approx(21 / row["elapsed_time"])
    assert row["requests_per_second"] == pytest.approx(6 / row["elapsed_time"])
    assert 0 < row["mean_batch"] <= 4
    assert row["preemptions"] == row["prefix_hit_tokens"] == 0


def test_texts_are_counted_by_the_tokenizer(tiny: Target) -> None:
    work = workloads.Workload("texts", ["Once upon a time", "The sea"], [2, 3])
    row = measure.throughput(tiny, work, 1, Limits(), quiet)
    assert row["total_input_tokens"] == sum(len(o.prompt_token_ids) for o in tiny.last) > 4
    assert row["bound_ms"] is None


def test_an_answer_that_is_cut_short_is_no_figure(
    tiny: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = tiny.llm.generate

    def shortened(*args: object) -> list:
        outputs = generate(*args)  # type: ignore[arg-type]
        outputs[0].token_ids.pop()
        return outputs

    monkeypatch.setattr(tiny.llm, "generate", shortened)
    with pytest.raises(KvrunError, match="1 tokens instead of 2"):
        tiny.seconds([[1, 2]], [2])


def test_about_says_what_a_figure_needs(tiny: Target) -> None:
    about = tiny.about(None)
    assert about["weights"] == "real"
    assert about["model_id"] == "tiny"
    assert about["shape"]["hidden_size"] == 256
    assert about["engine"]["max_model_len"] == 64
    assert about["engine"]["prefix_caching"] is False
    assert {"dtype", "kv_dtype", "device_name", "threads", "attention", "sampling"} <= about.keys()
    assert about["versions"].keys() >= {"kvrun", "torch", "python"}
    assert json.loads(json.dumps(about)) == about
    assert about["parameters"] == 8_131_328 - 19 * 256  # all but its norms, two a layer and one


def test_a_folder_with_nothing_but_a_config_gets_random_weights(tmp_path: Path) -> None:
    small = dict(
        SHAPES["qwen3-0.6b"], hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=300,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(small))
    with find(str(tmp_path), None) as model:
        assert model.random
        assert "weights are random" in model.why
        with Target(model, device="cpu", max_model_len=32, max_num_seqs=2) as target:
            [row] = measure.micro(target, [Case(4, 0, 2, 0)], 1, LIMITS, 1, quiet)
            assert row["avg_ts"] > 0
            assert max(map(max, [o.prompt_token_ids for o in target.last])) < 300
            assert target.about(None)["weights"] == "random"


def test_which_model_is_meant() -> None:
    with find(None, None) as model:
        assert (model.name, model.random, model.why) == ("tiny", False, "")
    with find("tiny", None, random=True) as model:
        assert (model.random, model.why) == (True, "")
    with find(None, "llama-3-8b") as model:
        assert (model.vocab_size, model.random) == (128256, True)
        folder = model.folder
    assert not folder.exists()
    with pytest.raises(InvalidRequest, match="MODEL and a --shape"), find("tiny", "llama-3-8b"):
        pass
    with pytest.raises(NotFound), find("no-such-model", None):
        pass


def test_random_weights_that_do_not_fit_are_refused_before_they_are_made(tmp_path: Path) -> None:
    large = dict(SHAPES["llama-3-8b"], num_hidden_layers=32000)
    (tmp_path / "config.json").write_text(json.dumps(large))
    with (
        find(str(tmp_path), None) as model,
        pytest.raises(Unsupported, match=r"need \d.* TB, .* are free"),
    ):
        Target(model, device="cpu")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("max_num_seqs=8", {"max_num_seqs": 8}),
        ("cuda-graphs = false", {"cuda_graphs": False}),
        ("kv_memory=0.5", {"kv_memory": 0.5}),
        ("block_size=null", {"block_size": None}),
        ("attention=sdpa", {"attention": "sdpa"}),
    ],
)
def test_options_of_the_engine(text: str, value: dict) -> None:
    assert parse_engine([text]) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_num_seqs", "has no ="),
        ("model=x", "'model' is no option"),
        ("load_format=dummy", "'load_format' is no option"),
        ("max_num_seqs=many", "a whole number"),
        ("max_num_seqs=true", "a whole number"),
        ("cuda_graphs=1", "true or false"),
        ("block_size=big", "a whole number"),
        ("block_size=1.5", "a whole number"),
        ("kv_memory=most", "a number"),
        ("device=[1]", "one value"),
    ],
)
def test_what_is_no_option_of_the_engine(text: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        parse_engine([text])
