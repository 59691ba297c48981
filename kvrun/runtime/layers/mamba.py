"""Mamba and Mamba-2: a convolution and a state that decays, in the place of attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from kvrun.runtime.cache.states import StateSpec
from kvrun.runtime.kernels import ssm
from kvrun.runtime.layers.linear import Linear, split_cols, split_rows
from kvrun.runtime.layers.mlp import activation, gate_and_up
from kvrun.runtime.layers.norm import Norm, before_product
from kvrun.runtime.layers.qkv import Shard, cut_heads
from kvrun.runtime.layers.ragged import parts

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.cache.states import Rows
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.source import Ranges

Scan = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# What the authors' `ssm_cfg` calls what transformers' configurations say.
_NAMES = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand",
          "dt_rank": "time_step_rank", "headdim": "head_dim", "ngroups": "n_groups"}  # fmt: skip


def adopt(w: "Checkpoint") -> None:
    """The authors' format, read as if it were transformers'. Raises Unsupported for what the
    latter does not have."""
    c = w.config
    said = c.get("ssm_cfg")
    if not isinstance(said, dict):
        return
    c.refuse("rms_norm", False)
    for beside in ("attn_layer_idx", "d_intermediate"):  # attention, MLPs
        if c.get(beside):
            c.refuse(beside, c.get(beside))
    multiple = c.integer("pad_vocab_size_multiple", 8)
    padded = -(-c.integer("vocab_size") // multiple) * multiple
    c.replace(vocab_size=padded, **{_NAMES[key]: said[key] for key in said if key in _NAMES})
    w.rename("backbone.embeddings.", "backbone.embedding.")


@dataclass(frozen=True)
class Sizes:
    """Of the whole model: `inner` channels, `state` values for each, `taps` of the convolution.

    `rank` is that of Mamba's time steps; Mamba-2 has `heads` that share inputs and outputs of
    states in `groups`, and bounds time steps by `limit`.
    """

    hidden: int
    inner: int
    state: int
    taps: int
    rank: int = 0
    heads: int = 1
    groups: int = 1
    limit: tuple[float, float] = (0.0, float("inf"))
    eps: float = 1e-5
    act: str = "silu"
    bias: bool = False
    conv_bias: bool = True


class Convolution:
    """x [tokens, channels] -> act(filtered) [tokens, channels] fp32; `rows` are kept of it."""

    def __init__(self, w: "Checkpoint", name: str, size: Sizes, total: int, rows: "Ranges") -> None:
        shape = (total, 1, size.taps)
        weight = w.read(f"{name}.weight", shape, (rows, None, None), torch.float32)
        self._weight = weight.squeeze(1)
        self._bias = (
            w.read(f"{name}.bias", (total,), (rows,), torch.float32) if size.conv_bias else None
        )
        self._act = activation(size.act)
        self.channels = len(weight)

    def __call__(self, x: torch.Tensor, layer: int, batch: "Batch") -> torch.Tensor:
        rows = _rows(batch)
        out, windows = torch.empty_like(x, dtype=torch.float32), rows.cache.window(layer, rows)
        for part in parts(batch):
            inputs, window = part.pad(x), part.of(windows)
            wide = inputs.float()
            y = ssm.causal_conv(wide, window.float(), self._weight, self._bias)
            rows.cache.keep_window(
                layer, part.of(rows.write), ssm.last_inputs(inputs, window, part.lengths)
            )
            out = part.put(self._act(y), out)
        return out


class Mamba:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first.

    Tensors of the mixer `p`; over ranks it is cut by channel.
    """

    def __init__(self, w: "Checkpoint", layer: int, p: str, size: Sizes) -> None:
        inner, n = size.inner, size.state
        mine = (w.group.cut(inner, f"{p} channels"),)
        self._rank, self._state = size.rank, n
        self._in = Linear(w, *gate_and_up(w, (f"{p}.in_proj",), size.hidden, inner), bias=size.bias)
        self._conv = Convolution(w, f"{p}.conv1d", size, inner, mine)
        self._x = Linear(w, split_cols(w, f"{p}.x_proj", size.rank + 2 * n, inner))
        self._dt = Linear(w, split_rows(w, f"{p}.dt_proj", inner, size.rank), bias=True)
        self._a = -w.read(f"{p}.A_log", (inner, n), (mine, None), torch.float32).exp()
        self._d = w.read(f"{p}.D", (inner,), (mine,), torch.float32)
        self._out = Linear(w, split_cols(w, f"{p}.out_proj", size.hidden, inner), bias=size.bias)
        self.spec = StateSpec(layer, size.taps - 1, len(self._d), (len(self._d), n))

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        x, before = before_product(norm, x)
        u, z = self._in(x, batch, before=before).chunk(2, 1)
        u = self._conv(u, self.spec.layer, batch)
        mixed = self._x(u.to(x.dtype), batch)
        rank, b, c = mixed.split_with_sizes((self._rank, self._state, self._state), 1)
        dt = F.softplus(self._dt(rank.contiguous(), batch).float())
        y = scanned(
            batch, self.spec.layer, u, dt, self._a, b, c, ssm.selective_step, ssm.selective_scan
        )
        y = y.addcmul_(u, self._d).mul_(F.silu(z.float()))
        return self._out(y.to(x.dtype), batch, add)


class Mamba2:
    """As Mamba, with one decay for each head and a norm behind the gate; cut by head."""

    def __init__(self, w: "Checkpoint", layer: int, p: str, size: Sizes) -> None:
        inner, n, groups = size.inner, size.state, size.groups
        self._h = h = cut_heads(w, size.heads, groups, inner // size.heads)
        shared = groups * n  # rows of b, and of c
        states = tuple((at + h.mine_kv[0] * n, at + h.mine_kv[1] * n) for at in (0, shared))
        mine = h.scaled(h.mine) + tuple((inner + a, inner + b) for a, b in states)
        rows = (
            h.scaled(h.mine)
            + tuple((inner + a, inner + b) for a, b in mine)
            + ((2 * inner + 2 * shared + h.mine[0], 2 * inner + 2 * shared + h.mine[1]),)
        )
        total = 2 * inner + 2 * shared + size.heads
        self._in = Linear(w, Shard(f"{p}.in_proj", total, size.hidden, rows=rows), bias=size.bias)
        self._conv = Convolution(w, f"{p}.conv1d", size, inner + 2 * shared, mine)
        bias, log, self._d = (
            w.read(f"{p}.{name}", (size.heads,), ((h.mine,),), torch.float32)
            for name in ("dt_bias", "A_log", "D")
        )
        self._bias, self._a = bias, -log.exp()
        self._limit = size.limit if size.limit != (0.0, float("inf")) else None
        self._norm = GatedNorm(w, f"{p}.norm", size, h.mine)
        self._out = Linear(w, split_cols(w, f"{p}.out_proj", size.hidden, inner), bias=size.bias)
        self._state = n
        width = h.count * h.head_dim
        self._parts = (width, h.kv_count * n, h.kv_count * n)
        self.spec = StateSpec(layer, size.taps - 1, sum(self._parts), (h.count, h.head_dim, n))

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        h, layer = self._h, self.spec.layer
        x, before = before_product(norm, x)
        projected = self._in(x, batch, before=before)
        z, mixed, dt = projected.split_with_sizes((self._parts[0], sum(self._parts), h.count), 1)
        u, b, c = self._conv(mixed, layer, batch).split_with_sizes(self._parts, 1)
        dt = F.softplus(dt.float() + self._bias)
        dt = dt if self._limit is None else dt.clamp_(*self._limit)
        heads = u.reshape(-1, h.count, h.head_dim)
        b, c = (t.reshape(-1, h.kv_count, self._state) for t in (b, c))
        y = scanned(batch, layer, heads, dt, self._a, b, c, ssm.ssd_step, ssm.ssd_scan)
        y = y.addcmul_(heads, self._d[:, None]).flatten(1)
        return self._out(self._norm(y, z).to(x.dtype), batch, add)


class GatedNorm:
    """RMSNorm of y · silu(gate) over each group of channels, also those on other ranks."""

    def __init__(self, w: "Checkpoint", name: str, size: Sizes, heads: tuple[int, int]) -> None:
        width, self._each = size.inner // size.heads, size.inner // size.groups
        mine = (heads[0] * width, heads[1] * width)
        self._weight = w.read(f"{name}.weight", (size.inner,), ((mine,),), torch.float32)
        self._eps, self._reduce = size.eps, w.group.all_reduce
        first, last = mine[0] // self._each, -(-mine[1] // self._each)
        # A group that several ranks share is summed up over them, each group in its own column.
        self._groups, self._mine = size.groups, slice(first, last)
        self._shared = (mine[1] - mine[0]) % self._each != 0

    def __call__(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """y [tokens, channels] fp32, overwritten; gate [tokens, channels]"""
        y = y.mul_(F.silu(gate.float()))
        grouped = y.view(len(y), self._mine.stop - self._mine.start, -1)
        squares = grouped.square().sum(-1)
        if self._shared:
            every = squares.new_zeros((len(y), self._groups))
            every[:, self._mine] = squares
            squares = self._reduce(every)[:, self._mine]
        grouped.mul_(torch.rsqrt(squares / self._each + self._eps)[..., None])
        return y.mul_(self._weight)


class MambaBlock:
    """x + mixer(norm(x)); `wide`: the sum is kept in fp32."""

    def __init__(self, norm: Norm, mixer: Mamba | Mamba2, dtype: torch.dtype, wide: bool) -> None:
        self._norm = norm
        self._mixer = mixer
        self._dtype = dtype
        self._wide = wide
        self.spec = mixer.spec

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        if not self._wide or self._dtype is torch.float32:
            return self._mixer(x, batch, add=x, norm=self._norm)
        return x.float().add_(self._mixer(x.to(self._dtype), batch, norm=self._norm))


class NarrowNorm:
    """A norm of a sum that is kept in fp32, back in the model's dtype."""

    def __init__(self, norm: Norm, dtype: torch.dtype) -> None:
        self._norm = norm
        self._dtype = dtype

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._norm(x.to(self._dtype), out)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual.add_(self(x))


def scanned(
    batch: "Batch",
    layer: int,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    step: Scan,
    scan: Scan,
) -> torch.Tensor:
    """What states give for x [tokens, ...], which they are moved on by; see kernels/ssm.py."""
    rows = _rows(batch)
    states, out = rows.cache.state(layer, rows), torch.empty_like(x)
    b, c = b.float().contiguous(), c.float().contiguous()
    for part in parts(batch):
        state = part.of(states)
        inputs = part.pad(x), part.pad(dt, zero=True), a, part.pad(b), part.pad(c)
        if part.length == 1:
            u, d, _, i, o = inputs
            y, state = step(u[:, 0], d[:, 0], a, i[:, 0], o[:, 0], state)
            y = y[:, None]
        else:
            y, state = scan(*inputs, state)
        rows.cache.keep_state(layer, part.of(rows.write), state)
        out = part.put(y, out)
    return out


def _rows(batch: "Batch") -> "Rows":
    return cast("Rows", batch.recurrent)
