"""Sampler: each option against one row of plain Python, in any batch; draws; faulty rows (E7)."""

import math
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kvrun.runtime.kernels.noise import Gumbel, keys
from kvrun.runtime.sampling import sampler as module
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.sampling.sampler import Sampler, SampleRow

INF = math.inf
GOLDEN_X = [2.0, 1.0, 0.5, -1.0, -3.0, 0.0]


def row(prompt: Any = (), output: Any = (), *, eos: Any = (), **options: Any) -> SampleRow:
    choice, seed = options.pop("choice", 0), options.pop("seed", 0)
    return SampleRow(SamplingParams(**options), seed, choice, prompt, output, eos)


def warped(logits: list[float], one: SampleRow, position: int = 0) -> list[float]:
    """The scores that a row is drawn from."""
    sampler = Sampler(len(logits), "cpu")
    scores = torch.tensor([logits], dtype=torch.float32)
    for stage, data in sampler.prepare([one]).stages:
        scores = stage.apply(scores, data, torch.tensor([position]))
    return scores[0].tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repetition_penalty": 1.2}, [2, 0.83333, 0.5, -1.2, -3, 0]),
        ({"top_k": 2}, [2, 1, -INF, -INF, -INF, -INF]),
        ({"top_p": 0.8}, [2, 1, 0.5, -INF, -INF, -INF]),
        ({"typical_p": 0.5}, [2, 1, -INF, -INF, -INF, -INF]),
        ({"min_p": 0.2}, [2, 1, 0.5, -INF, -INF, -INF]),
        ({"min_p": 1.0}, [2, -INF, -INF, -INF, -INF, -INF]),
        ({"temperature": 0.5}, [4, 2, 1, -2, -6, 0]),
        ({"logit_bias": {3: 5.0, 0: -1.5}}, [0.5, 1, 0.5, 4, -3, 0]),
        ({"frequency_penalty": 0.5}, [2, 1, 0.5, -2, -3, -0.5]),
        ({"presence_penalty": 0.5}, [2, 1, 0.5, -1.5, -3, -0.5]),
        ({"presence_penalty": -1, "frequency_penalty": 1}, [2, 1, 0.5, -2, -3, 0]),
    ],
    ids=str,
)
def test_golden_numbers(options: dict[str, Any], expected: list[float]) -> None:
    """The first five rows are those of Text Generation Inference's own classes."""
    got = warped(GOLDEN_X, row(prompt=[1], output=[3, 3, 5], **options))
    assert got == pytest.approx(expected, abs=1e-5)


def test_top_k_keeps_ties_and_top_p_the_lowest_ids() -> None:
    assert warped([1, 1, 0, 0], row(top_k=1)) == [1, 1, -INF, -INF]
    assert warped([0, 0, 0, 0], row(top_p=0.5)) == [0, 0, -INF, -INF]
    assert warped([-0.0, 0.0, -0.0, 0.0], row(top_p=0.3)) == [0, 0, -INF, -INF]


# One row in plain Python, from the definitions.


def reference(logits: list[float], one: SampleRow, position: int) -> list[float]:
    p, scores = one.params, list(map(float, logits))
    for token, bias in (p.logit_bias or {}).items():
        scores[token] += bias
    if position - len(one.prompt_ids) < p.min_tokens:
        for token in {*p.stop_token_ids, *(() if p.ignore_eos else one.eos_ids)}:
            scores[token] = -INF
    for token in {*one.prompt_ids, *one.output_ids}:
        r = p.repetition_penalty
        scores[token] = scores[token] * r if scores[token] < 0 else scores[token] / r
    for token, count in Counter(one.output_ids).items():
        scores[token] -= p.frequency_penalty * count + p.presence_penalty
    if p.greedy:
        return scores
    scores = [s / p.temperature for s in scores]
    if p.top_k:
        kth = sorted(scores, reverse=True)[min(p.top_k, len(scores)) - 1]
        scores = [s if s >= kth else -INF for s in scores]
    if p.top_p < 1:
        likely = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        scores = cut(scores, likely, p.top_p)
    if p.typical_p < 1:
        probabilities = softmax(scores)
        surprise = [-math.log(q) if q else INF for q in probabilities]
        mean = sum(q * s for q, s in zip(probabilities, surprise, strict=True) if q)
        typical = sorted(range(len(scores)), key=lambda i: (abs(surprise[i] - mean), i))
        scores = cut(scores, typical, p.typical_p)
    if p.min_p:
        probabilities = softmax(scores)
        least = p.min_p * max(probabilities)
        scores = [s if q >= least else -INF for s, q in zip(scores, probabilities, strict=True)]
    return scores


def softmax(scores: list[float]) -> list[float]:
    exps = [math.exp(s - max(scores)) for s in scores]
    return [e / sum(exps) for e in exps]


def cut(scores: list[float], order: list[int], p: float) -> list[float]:
    probabilities, mass, kept = softmax(scores), 0.0, set()
    for i in order:
        if mass >= p:
            break
        kept.add(i)
        mass += probabilities[i]
    return [s if i in kept else -INF for i, s in enumerate(scores)]


VOCAB = 12
tokens = st.integers(0, VOCAB - 1)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    "top_k": st.sampled_from([0, 1, 3, VOCAB, 50]),
    "top_p": st.sampled_from([0.17, 0.61, 0.93, 1.0]),
    "min_p": st.sampled_from([0.0, 0.03, 0.37]),
    "typical_p": st.sampled_from([0.23, 0.71, 1.0]),
    "repetition_penalty": st.sampled_from([0.7, 1.0, 1.4]),
    "presence_penalty": st.sampled_from([-0.4, 0.0, 0.9]),
    "frequency_penalty": st.sampled_from([-0.3, 0.0, 0.6]),
    "logit_bias": st.none() | st.dictionaries(tokens, st.sampled_from([-100.0, -1.1, 2.3])),
    "min_tokens": st.integers(0, 4),
    "stop_token_ids": st.lists(tokens, max_size=2),
    "ignore_eos": st.booleans(),
    "logprobs": st.none() | st.integers(0, 3),
}
sample_rows = st.builds(
    SampleRow,
    params=st.fixed_dictionaries({}, optional=OPTIONS).map(lambda o: SamplingParams(**o)),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 7),
    prompt_ids=st.lists(tokens, min_size=1, max_size=6),
    output_ids=st.lists(tokens, max_size=6),
    eos_ids=st.sampled_from([(), (0,), (0, 5)]),
)


@given(one=sample_rows, draw=st.integers(0, 2**31))
@settings(max_examples=300, deadline=None)
def test_every_option_against_the_reference(one: SampleRow, draw: int) -> None:
    logits = np.random.default_rng(draw).normal(0, 2, VOCAB).astype(np.float32).tolist()
    position = len(one.prompt_ids) + len(one.output_ids)
    expected = reference(logits, one, position)
    assert warped(logits, one, position) == pytest.approx(expected, abs=1e-4)
    sampler, positions = Sampler(VOCAB, "cpu"), torch.tensor([position])
    sampled = sampler.sample(torch.tensor([logits]), sampler.prepare([one]), positions)
    noise = torch.zeros(VOCAB)
    if not one.params.greedy:
        key = torch.tensor([keys(one.seed, one.choice)], dtype=torch.int32)
        noise = Gumbel(VOCAB, torch.device("cpu"))(key, positions)[0]
    totals = [s + n for s, n in zip(expected, noise.tolist(), strict=True)]
    assert bool(sampled.finite) == (max(expected) > -INF)
    if sampled.finite:
        assert totals[int(sampled.ids)] == pytest.approx(max(totals), abs=1e-4)


@given(batch=st.lists(sample_rows, min_size=2, max_size=6), draw=st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_a_row_does_not_feel_its_batch(batch: list[SampleRow], draw: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(draw).normal(0, 2, (len(batch), VOCAB))).float()
    positions = torch.tensor([len(r.prompt_ids) + len(r.output_ids) for r in batch])
    sampler = Sampler(VOCAB, "cpu")
    before = logits.clone()
    together = sampler.sample(logits, sampler.prepare(batch), positions)
    assert torch.equal(logits, before)
    for i, one in enumerate(batch):
        alone = sampler.sample(logits[i : i + 1], sampler.prepare([one]), positions[i : i + 1])
        assert alone.ids[0] == together.ids[i]
        assert alone.finite[0] == together.finite[i]
        if one.params.logprobs is not None:
            assert alone.logprobs is not None
            assert together.logprobs is not None
            for mine, ours in zip(alone.logprobs, together.logprobs, strict=True):
                row_of = ours[i] if ours.ndim == 1 else ours[i, : one.params.logprobs]
                assert torch.equal(mine[0], row_of)


def nucleus(logits: torch.Tensor, p: float) -> torch.Tensor:
    ((stage, data),) = Sampler(logits.shape[1], "cpu").prepare([row(top_p=p)] * len(logits)).stages
    return stage.apply(logits, data, torch.zeros(len(logits)))


def test_the_nucleus_is_the_same_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat row, whose nucleus is wide, may not change what a peaked one keeps."""
    torch.manual_seed(0)
    peaked, flat = torch.randn(6, 3000) * 5, torch.randn(1, 3000) * 0.1
    alone, mixed = nucleus(peaked, 0.9), nucleus(torch.cat([peaked, flat]), 0.9)
    monkeypatch.setattr(module, "NUCLEUS_TRY", 10**9)
    sorted_all = nucleus(torch.cat([peaked, flat]), 0.9)
    assert torch.equal(alone, mixed[:6])
    assert torch.equal(mixed, sorted_all)
    assert (alone.isfinite().sum(-1) < 256).all()
    assert mixed[6].isfinite().sum() > 2000


def test_the_nucleus_holds_its_mass_and_no_token_more() -> None:
    logits = np.random.default_rng(3).normal(0, 2, 500).astype(np.float32)
    probabilities = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
    mass = np.sort(probabilities)[::-1].cumsum()
    for p in np.linspace(0.01, 0.99, 99):
        kept = nucleus(torch.from_numpy(logits)[None], float(p))[0].isfinite().numpy()
        assert kept.sum() == np.searchsorted(mass, p) + 1
        assert probabilities[kept].min() > probabilities[~kept].max()


@pytest.mark.parametrize("name", ["top_p", "typical_p"])
def test_an_option_that_is_off_leaves_a_row_as_it_is(name: str) -> None:
    """One token has all the mass that fp32 can tell, and the others stay all the same."""
    sampler = Sampler(4, "cpu")
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [50.0, 1.0, 2.0, 3.0]])
    ((stage, data),) = sampler.prepare([row(**{name: 0.3}), row()]).stages
    scores = stage.apply(logits, data, torch.zeros(2))
    assert torch.equal(scores[1], logits[1])
    assert not torch.equal(scores[0], logits[0])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.9}], ids=str)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    count = 20000
    one = row(seed=11, **options)
    sampler = Sampler(6, "cpu")
    prepared = sampler.prepare([one] * count)
    logits = torch.tensor([GOLDEN_X]).expand(count, 6).contiguous()
    ids = sampler.sample(logits, prepared, torch.arange(count)).ids
    counts = np.bincount(ids.numpy(), minlength=6)
    expected = np.array(softmax(warped(GOLDEN_X, one))) * count
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    chi = float(((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum())
    assert chi < 25  # five degrees of freedom: p = 0.0001


def test_draws_depend_on_seed_choice_and_position_only() -> None:
    sampler, logits = Sampler(5000, "cpu"), torch.zeros(1, 5000)

    def drawn(seed: int, choice: int, position: int) -> int:
        prepared = sampler.prepare([row(seed=seed, choice=choice)])
        return int(sampler.sample(logits, prepared, torch.tensor([position])).ids)

    assert drawn(1, 0, 9) == drawn(1, 0, 9)
    assert len({drawn(1, 0, 9), drawn(2, 0, 9), drawn(1, 1, 9), drawn(1, 0, 10)}) == 4


def test_greedy_takes_the_lowest_of_equals_and_ignores_warpers() -> None:
    sampler = Sampler(4, "cpu")
    greedy = row(temperature=0, typical_p=0.1, top_p=0.1, top_k=1)
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [9.0, 0.0, 0.0, 0.0]])
    for batch in ([greedy] * 2, [greedy, row()]):
        prepared = sampler.prepare(batch)
        assert sampler.sample(logits, prepared, torch.tensor([5, 5])).ids[0] == 1


def test_min_tokens_ends_by_position() -> None:
    """Prepared once, it serves every step."""
    sampler = Sampler(4, "cpu")
    prepared = sampler.prepare(
        [row([1, 1], eos=(0, 9), temperature=0, min_tokens=2, stop_token_ids=[3])]
    )
    assert not prepared.needs_history
    logits = torch.tensor([[5.0, 1.0, 2.0, 9.0]])
    drawn = [int(sampler.sample(logits, prepared, torch.tensor([at])).ids) for at in (2, 3, 4)]
    assert drawn == [2, 2, 3]


def test_history_is_asked_for_by_penalties_alone() -> None:
    sampler = Sampler(4, "cpu")
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert sampler.prepare([row(), row(**{name: 1.5})]).needs_history
    assert not sampler.prepare([row(top_p=0.5, logit_bias={1: 1.0}, min_tokens=3)]).needs_history


def test_ids_outside_the_vocabulary_do_no_harm() -> None:
    sampler = Sampler(4, "cpu")
    one = row([1, 77], [99], eos=(50,), temperature=0, repetition_penalty=2.0, min_tokens=9,
              frequency_penalty=1.0, logit_bias={4: 9.0})  # fmt: skip
    logits = torch.tensor([[1.0, 1.5, 0.0, 0.0]])
    assert sampler.sample(logits, sampler.prepare([one]), torch.tensor([0])).ids.tolist() == [0]


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {}, {"top_p": 0.5, "top_k": 2, "typical_p": 0.5, "min_p": 0.1},
     {"temperature": 0, "repetition_penalty": 1.5}, {"logit_bias": {1: -50.0}, "logprobs": 2}],
    ids=str,
)  # fmt: skip
def test_e7_a_faulty_row_is_flagged_and_hurts_nobody(options: dict[str, Any]) -> None:
    sampler = Sampler(6, "cpu")
    rows = [row([1], [1], **options)] * 5
    good = torch.tensor(GOLDEN_X)
    logits = good.repeat(5, 1)
    clean = sampler.sample(logits, sampler.prepare(rows), torch.arange(5))
    logits[0, 1] = math.nan
    logits[2, 4] = INF
    logits[3] = -INF
    sampled = sampler.sample(logits, sampler.prepare(rows), torch.arange(5))
    assert sampled.finite.tolist() == [False, True, False, False, True]
    assert sampled.ids[[1, 4]].tolist() == clean.ids[[1, 4]].tolist()
    assert ((sampled.ids >= 0) & (sampled.ids < 6)).all()


def test_e7_options_that_leave_no_token_are_flagged() -> None:
    sampler = Sampler(2, "cpu")
    rows = [row(eos=(0, 1), min_tokens=1, temperature=t) for t in (0.0, 1.0)] + [row()]
    sampled = sampler.sample(torch.zeros(3, 2), sampler.prepare(rows), torch.zeros(3).long())
    assert sampled.finite.tolist() == [False, False, True]


def test_e7_a_fault_that_an_option_hides_is_flagged() -> None:
    sampler = Sampler(3, "cpu")
    for fault in (math.nan, INF):
        logits = torch.tensor([[fault, 1.0, 2.0]])
        prepared = sampler.prepare([row(eos=(0,), min_tokens=1, temperature=0)])
        assert sampler.sample(logits, prepared, torch.tensor([0])).finite.tolist() == [False]


def test_a_masked_logit_is_no_fault() -> None:
    sampler = Sampler(3, "cpu")
    for options in ({"temperature": 0}, {"typical_p": 0.9, "top_p": 0.9, "min_p": 0.1}):
        logits = torch.tensor([[-INF, 1.0, 2.0]])
        sampled = sampler.sample(logits, sampler.prepare([row(**options)]), torch.tensor([0]))
        assert sampled.finite.tolist() == [True]
        assert sampled.ids[0] != 0


def test_logprobs_are_the_models_own() -> None:
    sampler = Sampler(6, "cpu")
    logits = torch.tensor([GOLDEN_X])
    prepared = sampler.prepare([row(temperature=0, logit_bias={4: 100.0}, logprobs=2)])
    sampled = sampler.sample(logits, prepared, torch.tensor([0]))
    raw = logits.log_softmax(-1)[0]
    assert sampled.ids.tolist() == [4]
    assert sampled.logprobs is not None
    chosen, top_ids, top = sampled.logprobs
    assert chosen.tolist() == pytest.approx([raw[4].item()])
    assert top_ids.tolist() == [[0, 1]]
    assert top[0].tolist() == pytest.approx(raw[:2].tolist())
    none = sampler.sample(logits, sampler.prepare([row(logprobs=0)]), torch.tensor([0])).logprobs
    assert none is not None
    assert none[1].shape == (1, 0)
    assert sampler.sample(logits, sampler.prepare([row()]), torch.tensor([0])).logprobs is None


def test_likeliest_tokens_of_equals_are_the_lowest() -> None:
    sampler = Sampler(500, "cpu")
    logits = torch.zeros(1, 500)
    logits[0, 400] = -1
    logits[0, ::2] = -0.0
    prepared = sampler.prepare([row(logprobs=20)])
    sampled = sampler.sample(logits, prepared, torch.tensor([0]))
    assert sampled.logprobs is not None
    assert sampled.logprobs[1].tolist() == [list(range(20))]
