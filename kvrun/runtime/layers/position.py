"""Positions: rotary, in place on queries and keys together; learned, added to the embedding; or
slopes for a bias that grows with the distance."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvrun.errors import Unsupported
from kvrun.runtime.device import kernel

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.hf_config import HFConfig
    from kvrun.runtime.layers.qkv import Heads


class Rope:
    """Rotates pairs of dimensions by angles that grow with the position (Su et al. 2021).

    Pairs are (i, i + half) or, `interleaved`, (2i, 2i + 1), over the first `partial_rotary_factor`
    of a head. Angles are computed once a step in fp32 and shared by the layers.
    """

    def __init__(
        self,
        parameters: "HFConfig",
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        interleaved: bool = False,
    ) -> None:
        self._width = int(head_dim * parameters.number("partial_rotary_factor"))
        self.interleaved = interleaved
        self._dtype = dtype
        frequencies, self._factor = scaled_frequencies(parameters, self._width)
        self._frequencies = frequencies.to(device)
        self._kernel = kernel("rotary", device)
        # out = x·cos + partner·sin, where the first of a pair takes its partner with a minus:
        # sin(-a) = -sin(a) and cos(-a) = cos(a), so the sign lies in the frequency.
        pair = torch.stack((-frequencies, frequencies), dim=1 if interleaved else 0)
        self._signed = pair.reshape(1, 1, -1).to(device)

    def __call__(self, x: torch.Tensor, batch: "Batch") -> None:
        """Rotate x [tokens, heads, head_dim] in place."""
        tables = batch.shared.get(self)
        if tables is None:
            tables = batch.shared[self] = self._tables(batch.positions)
        cos, sin = tables
        if self._width < x.shape[-1]:
            x = x[..., : self._width]
        if self.interleaved:
            partner = x.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
        else:
            partner = x.roll(self._width // 2, -1)
        x.mul_(cos).addcmul_(partner, sin)

    def angles(self, batch: "Batch") -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [tokens, width / 2] in fp32, for kernels that turn, of a step's tokens."""
        tables = batch.shared.get(self)
        if tables is None:
            tables = self._kernel.tables(batch.positions, self._frequencies, self._factor)
            batch.shared[self] = tables
        angles: tuple[torch.Tensor, torch.Tensor] = tables
        return angles

    def _tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions.view(-1, 1, 1) * self._signed
        cos, sin = angles.cos(), angles.sin_()
        if self._factor != 1.0:
            cos, sin = cos.mul_(self._factor), sin.mul_(self._factor)
        return cos.to(self._dtype), sin.to(self._dtype)


class LearnedPositions:
    """An embedding plus a row of its own for each position; the table begins at row `offset`."""

    def __init__(
        self,
        w: "Checkpoint",
        embedding: "Callable[[Batch], torch.Tensor]",
        name: str,
        count: int,
        hidden: int,
        offset: int = 0,
    ) -> None:
        self._embedding = embedding
        self._table = w.read(f"{name}.weight", (count + offset, hidden))[offset:]

    def __call__(self, batch: "Batch") -> torch.Tensor:
        # A captured step may run a few positions past the end, and nobody reads what it draws.
        positions = batch.positions.clamp(max=len(self._table) - 1)
        return self._embedding(batch).add_(F.embedding(positions, self._table))


class GrowingQueries:
    """Queries times 1 + beta · log(1 + floor((position + shift) / span)), before they are rotated,
    which commutes."""

    def __init__(self, heads: "Heads", beta: float, span: float, shift: int = 0) -> None:
        self._queries = heads.count
        self._beta = beta
        self._span = span
        self._shift = shift

    def __call__(self, qk: torch.Tensor, batch: "Batch") -> None:
        """Scale the queries of qk [tokens, heads + kv_heads, head_dim] in place."""
        spans = ((batch.positions + self._shift) / self._span).floor_()
        factor = spans.log1p_().mul_(self._beta).add_(1.0).to(qk.dtype)
        qk[:, : self._queries].mul_(factor.view(-1, 1, 1))


class RelativeBias:
    """A learned bias per head on every score, by the distance of its query and key (T5).

    name: a table [buckets, heads] of the whole model, of which this rank keeps its heads. Near
    distances have a bucket each, farther ones share them, ever more up to `longest`, beyond which
    all are alike. With `both`, keys that follow the query have half of the buckets.
    """

    def __init__(self, w: "Checkpoint", name: str, h: "Heads", *, both: bool) -> None:
        buckets = w.config.integer("relative_attention_num_buckets", 32)
        longest = w.config.integer("relative_attention_max_distance", 128)
        table = w.read(f"{name}.weight", (buckets, h.heads), (None, (h.mine,)), torch.float32)
        distances = torch.arange(longest + 1, device=table.device)
        back = _bucket(distances, buckets // 2 if both else buckets, longest)
        # A decoder sees no key ahead of its query.
        ahead = back[1:] + buckets // 2 if both else torch.zeros_like(back[1:])
        # Of a key this far behind its query, and then of those ahead of it.
        self.behind = table[back].t().contiguous()  # [heads, longest + 1]
        self._around = torch.cat((self.behind.flip(1), table[ahead].t()), 1).to(w.dtype)
        self._longest = longest

    def among(self, batch: "Batch", first: int, last: int, count: int) -> torch.Tensor:
        """[heads, last - first, count] for these queries and all keys of a prompt, which may be
        shared by the layers."""
        if last - first < count:
            return self._square(first, last, count)
        most = max(batch.query_lens_host)
        found = batch.shared.get(self)
        if found is None and len(self._around) * most * most <= 1 << 25:
            found = batch.shared[self] = self._square(0, most, most)
        return self._square(0, count, count) if found is None else found[:, :count, :count]

    def _square(self, first: int, last: int, keys: int) -> torch.Tensor:
        at = torch.arange(keys, device=self._around.device)
        ahead = at - at[first:last, None]
        return self._around[:, ahead.clamp_(-self._longest, self._longest) + self._longest]


def relative_biases(
    w: "Checkpoint", name: str, h: "Heads", count: int, *, every: bool, both: bool
) -> list[RelativeBias]:
    """One for each of `count` layers, whose numbers go into `name`; unless `every` layer has its
    own, all share the first one's."""
    found = [RelativeBias(w, name.format(n), h, both=both) for n in range(count if every else 1)]
    return found if every else found * count


def _bucket(distances: torch.Tensor, buckets: int, longest: int) -> torch.Tensor:
    """The bucket of each distance: half of them for the nearest, the others by logarithm."""
    exact = buckets // 2
    share = torch.log(distances.clamp(min=1).float() / exact) / math.log(longest / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return torch.where(distances < exact, distances, far)


def alibi_slopes(heads: int, device: torch.device, most: float = 8.0) -> torch.Tensor:
    """[heads] fp32, as Bloom and MPT choose them (Press et al. 2022).

    Powers of 2^(-most / n) for the largest power of two n of heads, and odd powers of its root for
    the heads beyond.
    """
    base = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-most * i / base) for i in range(1, base + 1)]
    slopes += [2 ** (-most * (i + 0.5) / base) for i in range(heads - base)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def scaled_frequencies(parameters: "HFConfig", width: int) -> tuple[torch.Tensor, float]:
    """Angles per position [width / 2] in fp32, and the factor on cos and sin.

    Raises Unsupported for a scaling that kvrun does not know.
    """
    kind = parameters.text("rope_type")
    if not 2 <= width <= 1 << 16 or width % 2:
        raise Unsupported(f"rotary positions over {width} dimensions of a head are not supported.")
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / parameters.number("rope_theta") ** exponents
    # Dynamic scaling begins beyond max_position_embeddings, where a context ends.
    if kind in ("default", "dynamic"):
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / parameters.number("factor"), 1.0
    if kind == "llama3":
        return _llama3(parameters, frequencies), 1.0
    if kind == "yarn":
        return _yarn(parameters, frequencies, width)
    if kind in ("longrope", "su"):
        return _longrope(parameters, frequencies)
    raise Unsupported(
        f"the rotary scaling '{kind}' is not supported.",
        hint="known: default, linear, dynamic, llama3, yarn, longrope",
    )


def _llama3(parameters: "HFConfig", frequencies: torch.Tensor) -> torch.Tensor:
    """Slow frequencies divided by the factor, fast ones kept, a ramp between (Llama 3.1)."""
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    turns = parameters.number("original_max_position_embeddings") * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / parameters.number("factor")


def _yarn(
    parameters: "HFConfig", frequencies: torch.Tensor, width: int
) -> tuple[torch.Tensor, float]:
    """Slow frequencies divided by the factor, fast ones kept, a ramp over dimensions between
    (Peng et al. 2023)."""
    trained = parameters.number("original_max_position_embeddings")
    longest = parameters.number("max_position_embeddings", trained)
    factor = parameters.number("factor", longest / trained)
    base = parameters.number("rope_theta")

    def dimension(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = dimension(parameters.number("beta_fast", 32.0))
    last = dimension(parameters.number("beta_slow", 1.0))
    if parameters.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
    divided = ramp.clamp(0.0, 1.0)
    scaled = divided * frequencies / factor + (1.0 - divided) * frequencies

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = mscale(1.0)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        attention = mscale(parameters.number("mscale"))
        attention /= mscale(parameters.number("mscale_all_dim"))
    return scaled, parameters.number("attention_factor", attention)


def _longrope(parameters: "HFConfig", frequencies: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Each frequency divided by a factor of its own, of two lists (Ding et al. 2024).

    The list is chosen by the longest context there may be, whatever the length of a sequence: keys
    in the cache are rotated already, and a sequence must not depend on its neighbours.
    """
    trained = parameters.number("original_max_position_embeddings")
    longest = parameters.number("max_position_embeddings")
    kind = "long" if parameters.number("context", longest) > trained else "short"
    divisors = parameters.numbers(f"{kind}_factor", len(frequencies))
    factor = parameters.number("factor", longest / trained)
    spread = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    found = frequencies / torch.tensor(divisors, dtype=torch.float32)
    spread = parameters.number("attention_factor", parameters.number(f"{kind}_mscale", spread))
    return found, spread


def yarn_growth(parameters: "HFConfig") -> float:
    """What DeepSeek's models multiply the scale of their scores by under yarn."""
    weight = parameters.number("mscale_all_dim", 0.0)
    if parameters.text("rope_type") == "default" or not weight:
        return 1.0
    return (0.1 * weight * math.log(max(parameters.number("factor"), 1.0)) + 1.0) ** 2
