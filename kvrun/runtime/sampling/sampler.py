"""Sampler: logits -> tokens, every row by its own options, whatever else is in the batch."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from kvrun.runtime.kernels.noise import Gumbel, keys
from kvrun.runtime.sampling.params import SamplingParams

# Sorting a vocabulary costs ten times as much as finding its largest. Where the host can look at
# a tensor without waiting, top_p tries with this many first.
NUCLEUS_TRY = 256
SCORE_SLICE = 256  # rows of logits that are turned to log-probabilities at once


@dataclass
class SampleRow:
    """What one row of logits is drawn by. `seed` is resolved; `output_ids` is what is known."""

    params: SamplingParams
    seed: int
    choice: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    eos_ids: tuple[int, ...]


class Stage(NamedTuple):
    """How one option changes scores [S, V].

    `prepare(rows, sampler)` makes its tensors, or None when no row asks for it;
    `apply(scores, prepared, positions)` returns new scores, the same bits for rows without it.
    """

    name: str
    prepare: Callable[[Sequence[SampleRow], "Sampler"], Any]
    apply: Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Prepared:
    """The options of a batch of `size` rows as tensors.

    Stays valid while the batch has the same rows, unless `needs_history`: then each new token
    makes it old.
    """

    size: int
    needs_history: bool
    logprobs: int | None  # how many likeliest tokens to report; None: no log-probabilities
    stages: list[tuple[Stage, Any]]
    keys: torch.Tensor | None  # [S, 2] int32 of noise; None when every row is greedy
    drawn: torch.Tensor | None  # [S, 1] fp32, 0 for greedy rows; None when every row is drawn


# Of the chosen tokens [S], and ids and values [S, k] of the likeliest.
Logprobs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Sampled:
    """ids [S] int64; finite [S] bool: false where logits or options leave no proper draw.

    `logprobs`: those of the ids [S], and ids and values [S, k] of the likeliest tokens: the
    model's own, before any option.
    """

    ids: torch.Tensor
    finite: torch.Tensor
    logprobs: Logprobs | None
    prompt: Logprobs | None = None  # of tokens of prompts, [R]
    states: torch.Tensor | None = None  # of prompts that are pooled, [P, hidden] fp32


class Sampler:
    """Draws one token per row. What a row gets depends on nothing but itself and its position."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._noise = Gumbel(vocab_size, self.device)

    def prepare(self, rows: Sequence[SampleRow]) -> Prepared:
        """The options of `rows`, in the order of their logits. Ids outside the vocabulary
        are left out."""
        prepared = [(stage, stage.prepare(rows, self)) for stage in STAGES]
        counts = [row.params.logprobs for row in rows if row.params.logprobs is not None]
        greedy = [row.params.greedy for row in rows]
        noise = [keys(row.seed, row.choice) for row in rows]
        return Prepared(
            size=len(rows),
            needs_history=any(row.params.needs_history for row in rows),
            logprobs=max(counts) if counts else None,
            stages=[(stage, data) for stage, data in prepared if data is not None],
            keys=None if all(greedy) else self.tensor(noise, torch.int32),
            drawn=self.tensor([[float(not g)] for g in greedy]) if any(greedy) else None,
        )

    def sample(self, logits: torch.Tensor, prepared: Prepared, positions: torch.Tensor) -> Sampled:
        """One token per row of logits [S, V] fp32, which stay as they are.

        positions: [S] int64, the index in its sequence of the token being drawn. Equal scores go
        to the lowest id.
        """
        scores = logits
        if prepared.stages and isinstance(prepared.stages[0][1], Edit):
            scores = logits.clone()
        for stage, data in prepared.stages:
            scores = stage.apply(scores, data, positions)
        if prepared.keys is not None:
            noise = self._noise(prepared.keys, positions)
            scores = scores + (noise if prepared.drawn is None else noise.mul_(prepared.drawn))
        best, ids = scores.max(-1)
        if scores is not logits:  # an option may have hidden what is wrong with a row
            best = best + logits.amax(-1)
        # What is not finite minus itself is NaN: a third of the cost of isfinite.
        return Sampled(ids, (best - best) == 0, self._logprobs(logits, ids, prepared.logprobs))

    def tensor(self, values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if self.device.type != "cuda":
            return torch.tensor(values, dtype=dtype, device=self.device)
        # From pageable memory the copy would wait for the steps that are under way.
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(self.device, non_blocking=True)

    def score(self, logits: torch.Tensor, ids: torch.Tensor, count: int) -> Logprobs:
        """How likely logits [R, V] make ids [R], and their `count` likeliest."""
        slices = [slice(at, at + SCORE_SLICE) for at in range(0, len(ids), SCORE_SLICE)]
        parts = [self._score(logits[part].float(), ids[part], count) for part in slices]
        first, second, third = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return first, second, third

    def _logprobs(
        self, logits: torch.Tensor, ids: torch.Tensor, count: int | None
    ) -> Logprobs | None:
        return None if count is None else self._score(logits, ids, count)

    def _score(self, logits: torch.Tensor, ids: torch.Tensor, count: int) -> Logprobs:
        values = logits.log_softmax(-1)
        chosen = values.gather(1, ids[:, None])[:, 0]
        ranks = _ranks(logits).topk(min(count, self.vocab_size)).values
        top = _ids_of(ranks, self.vocab_size)
        return chosen, top, values.gather(1, top)


class Edit(NamedTuple):
    """Some scores of each row, none of them twice; `at` is their place in the flat [S * V]."""

    at: torch.Tensor  # [E] int64
    rows: torch.Tensor  # [E] int64
    values: torch.Tensor  # [E]


def _edit(
    of_rows: Sequence[Mapping[int, float]], sampler: Sampler, dtype: torch.dtype = torch.float32
) -> Edit | None:
    sizes = [len(values) for values in of_rows]
    if not any(sizes):
        return None
    rows = np.repeat(np.arange(len(of_rows)), sizes)
    ids = np.fromiter(chain.from_iterable(of_rows), np.int64, sum(sizes))
    numbers = chain.from_iterable(values.values() for values in of_rows)
    known = (ids >= 0) & (ids < sampler.vocab_size)
    return Edit(
        sampler.tensor((rows * sampler.vocab_size + ids)[known], torch.int64),
        sampler.tensor(rows[known], torch.int64),
        sampler.tensor(np.fromiter(numbers, np.float64, sum(sizes))[known], dtype),
    )


def _bias(rows: Sequence[SampleRow], sampler: Sampler) -> Edit | None:
    return _edit([row.params.logit_bias or {} for row in rows], sampler)


def _add(scores: torch.Tensor, edit: Edit, positions: torch.Tensor) -> torch.Tensor:
    scores.view(-1).index_add_(0, edit.at, edit.values)
    return scores


def _min_tokens(rows: Sequence[SampleRow], sampler: Sampler) -> Edit | None:
    """Tokens that would end a text, with the first position at which they may."""
    ends = []
    for row in rows:
        params = row.params
        ids = {*params.stop_token_ids, *(() if params.ignore_eos else row.eos_ids)}
        first = len(row.prompt_ids) + params.min_tokens
        ends.append(dict.fromkeys(ids if params.min_tokens else (), first))
    return _edit(ends, sampler, torch.int64)


def _forbid_early(scores: torch.Tensor, edit: Edit, positions: torch.Tensor) -> torch.Tensor:
    flat = scores.view(-1)
    early = positions[edit.rows] < edit.values
    flat.index_copy_(0, edit.at, flat[edit.at].masked_fill_(early, -math.inf))
    return scores


def _repetition(rows: Sequence[SampleRow], sampler: Sampler) -> Edit | None:
    """Every token of prompt and output once (CTRL, Keskar et al. 2019)."""
    return _edit(
        [
            dict.fromkeys({*row.prompt_ids, *row.output_ids}, row.params.repetition_penalty)
            if row.params.repetition_penalty != 1
            else {}
            for row in rows
        ],
        sampler,
    )


def _divide(scores: torch.Tensor, edit: Edit, positions: torch.Tensor) -> torch.Tensor:
    flat = scores.view(-1)
    old = flat[edit.at]
    flat.index_copy_(0, edit.at, torch.where(old < 0, old * edit.values, old / edit.values))
    return scores


def _penalty(rows: Sequence[SampleRow], sampler: Sampler) -> Edit | None:
    """OpenAI's penalties: frequency by how often a token is in the output, presence by whether."""
    penalties: list[dict[int, float]] = []
    for row in rows:
        once, each = row.params.presence_penalty, row.params.frequency_penalty
        counts = Counter(row.output_ids if once or each else ())
        penalties.append({token: -(each * n + once) for token, n in counts.items()})
    return _edit(penalties, sampler)


def _column(
    name: str, off: float, change: Callable[[float], float] = float
) -> Callable[[Sequence[SampleRow], Sampler], torch.Tensor | None]:
    """Prepares the numbers of an option as [S, 1]; greedy rows have it off."""

    def prepare(rows: Sequence[SampleRow], sampler: Sampler) -> torch.Tensor | None:
        values = [off if r.params.greedy else getattr(r.params, name) for r in rows]
        if all(value == off for value in values):
            return None
        return sampler.tensor([[change(value)] for value in values])

    return prepare


def _flatten(scores: torch.Tensor, by: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return scores / by


class TopK(NamedTuple):
    ks: torch.Tensor  # [S, 1] int64
    off: torch.Tensor  # [S, 1] bool
    most: int


def _top_k(rows: Sequence[SampleRow], sampler: Sampler) -> TopK | None:
    ks = [0 if row.params.greedy else row.params.top_k for row in rows]
    ks = [k if k < sampler.vocab_size else 0 for k in ks]
    if not any(ks):
        return None
    column = sampler.tensor(ks, torch.int64)[:, None]
    return TopK(column.clamp(min=1), column == 0, max(ks))


def _keep_top_k(scores: torch.Tensor, top: TopK, positions: torch.Tensor) -> torch.Tensor:
    """Keeps what is not below the k-th largest, so equals of that one too."""
    kth = scores.topk(top.most).values.gather(1, top.ks - 1)
    return scores.masked_fill(scores < kth.masked_fill_(top.off, -math.inf), -math.inf)


class Mass(NamedTuple):
    p: torch.Tensor  # [S, 1]
    off: torch.Tensor  # [S, 1] bool


def _mass(name: str) -> Callable[[Sequence[SampleRow], Sampler], Mass | None]:
    column = _column(name, 1.0)

    def prepare(rows: Sequence[SampleRow], sampler: Sampler) -> Mass | None:
        p = column(rows, sampler)
        return None if p is None else Mass(p, p == 1)

    return prepare


def _keep_top_p(scores: torch.Tensor, top: Mass, positions: torch.Tensor) -> torch.Tensor:
    """Keeps the likeliest tokens up to the one that brings their mass to p."""
    vocab = scores.shape[-1]
    probabilities = scores.softmax(-1)
    width = min(NUCLEUS_TRY, vocab) if scores.device.type == "cpu" else vocab
    while True:
        values, ids = scores.topk(width) if width < vocab else scores.sort(descending=True)
        mass = probabilities.gather(1, ids).cumsum(-1)
        if width == vocab or bool(((mass[:, -1:] >= top.p) | top.off).all()):
            break
        width = vocab
    last = (mass < top.p).sum(-1, keepdim=True).clamp_(max=width - 1)
    lowest = values.gather(1, last).masked_fill_(top.off, -math.inf)
    # Of the tokens that equal the last one kept, as many as fit, lowest ids first.
    equals = last + 1 - (values > lowest).sum(-1, keepdim=True)
    equal = scores == lowest
    kept = (equal & (equal.cumsum(-1) <= equals)) | (scores > lowest)
    return torch.where(kept, scores, -math.inf)


def _keep_typical(scores: torch.Tensor, typical: Mass, positions: torch.Tensor) -> torch.Tensor:
    """Keeps the tokens whose surprise is nearest its mean, up to mass p (Meister et al. 2022)."""
    surprise = -scores.log_softmax(-1)
    probabilities = (-surprise).exp()
    # A cumulative sum adds in a fixed order; a plain sum may split a row when it is alone.
    terms = torch.where(probabilities > 0, probabilities * surprise, 0.0)
    mean = terms.cumsum(-1)[:, -1:]
    order = (surprise - mean).abs().sort(dim=-1, stable=True).indices
    mass = probabilities.gather(1, order).cumsum(-1)
    kept = (mass < typical.p).sum(-1, keepdim=True) + 1
    places = torch.arange(scores.shape[-1], device=scores.device)
    dropped = torch.zeros_like(scores, dtype=torch.bool)
    dropped.scatter_(1, order, (places >= kept) & ~typical.off)
    return scores.masked_fill(dropped, -math.inf)


def _keep_min_p(scores: torch.Tensor, log_p: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + log_p, -math.inf)


def _log(value: float) -> float:
    return math.log(value) if value else -math.inf


def _ranks(scores: torch.Tensor) -> torch.Tensor:
    """[S, V] int64, all different in a row, ordered as scores and equal scores by lowest id."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: minus zero is zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, negative floats run backwards
    vocab = scores.shape[-1]
    last_first = torch.arange(vocab - 1, -1, -1, device=scores.device)
    return (ordered.long() << 32) + last_first


def _ids_of(ranks: torch.Tensor, vocab: int) -> torch.Tensor:
    return vocab - 1 - (ranks & 0xFFFFFFFF)


# The order of these rows is the order in which options act (the one of Text Generation Inference,
# which knows no logit_bias, min_tokens and min_p). Edits come first: they work in place.
STAGES = (
    Stage("logit_bias", _bias, _add),
    Stage("min_tokens", _min_tokens, _forbid_early),
    Stage("repetition_penalty", _repetition, _divide),
    Stage("frequency_penalty, presence_penalty", _penalty, _add),
    Stage("temperature", _column("temperature", 1.0), _flatten),
    Stage("top_k", _top_k, _keep_top_k),
    Stage("top_p", _mass("top_p"), _keep_top_p),
    Stage("typical_p", _mass("typical_p"), _keep_typical),
    Stage("min_p", _column("min_p", 0.0, _log), _keep_min_p),
)
