"""Norms, matrices, embeddings and activations by themselves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.kernels import skinny
from kvrun.runtime.layers import embedding
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.linear import Linear
from kvrun.runtime.layers.mlp import MLP, GatedMLP, gate_and_up
from kvrun.runtime.layers.norm import (
    HeadLayerNorm,
    HeadNorm,
    LayerNorm,
    RMSNorm,
    before_product,
    layer_norm,
    rms_norm,
)
from kvrun.runtime.layers.position import LearnedPositions
from kvrun.runtime.layers.qkv import Heads
from kvrun.runtime.parallel import Group
from kvrun.runtime.quant import dense

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NOBODY: Any = SimpleNamespace(lora=None)  # a batch of which the parts need to know nothing more


def stored(folder: Path, dtype: torch.dtype = torch.float32, **values: torch.Tensor) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "num_hidden_layers": 1}))
    save_file({n.replace("__", "."): t for n, t in values.items()}, folder / "model.safetensors")
    return Checkpoint(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [64, 100])
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, size).to(dtype), torch.rand(size) + 0.5
    x[3] *= 1e-3  # eps counts here
    wide = x.double()
    wanted = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    found = RMSNorm(weight, 1e-5)(x)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_norm_of_zeros_is_zero() -> None:
    assert torch.equal(RMSNorm(torch.ones(8), 1e-5)(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_norm_offset(tmp_path: Path) -> None:
    weight = torch.randn(8)
    w = stored(tmp_path, a__weight=weight)
    x = torch.randn(3, 8)
    torch.testing.assert_close(
        rms_norm(w, "a", 8, 1e-6, offset=1.0)(x), RMSNorm(1 + weight, 1e-6)(x)
    )
    w.close()


@pytest.mark.parametrize("dtype", FLOATS)
def test_head_norm_works_in_place_on_views(tmp_path: Path, dtype: torch.dtype) -> None:
    q, k = torch.rand(8) + 0.5, torch.rand(8) + 0.5
    w = stored(tmp_path, q__weight=q, k__weight=k)
    heads = Heads(heads=4, kv_heads=2, head_dim=8, mine=(0, 4), mine_kv=(0, 2))
    norm = HeadNorm(w, "q", "k", heads, 1e-6)
    buffer = torch.randn(5, 8, 8).to(dtype)
    before = buffer.clone()
    view = buffer[:, :6]
    norm(view, NOBODY)
    assert torch.equal(buffer[:, 6:], before[:, 6:])
    assert torch.equal(buffer[:, :4], RMSNorm(q, 1e-6)(before[:, :4].contiguous()))
    assert torch.equal(buffer[:, 4:6], RMSNorm(k, 1e-6)(before[:, 4:6].contiguous()))
    w.close()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_layer_norm(tmp_path: Path, dtype: torch.dtype, bias: bool, offset: float) -> None:
    torch.manual_seed(0)
    weight, shift, x = torch.rand(24), torch.randn(24), torch.randn(5, 24)
    w = stored(tmp_path, dtype, a__weight=weight, a__bias=shift)
    norm = layer_norm(w, "a", 24, 1e-5, bias=bias, offset=offset)
    w.close()
    wanted = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    wanted = wanted * (weight + offset) + (shift if bias else 0.0)
    tolerance = 8 * torch.finfo(dtype).eps
    found = norm(x.to(dtype))
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=2 * tolerance)
    rest = torch.ones(5, 24, dtype=dtype)
    assert norm.add_to(rest, x.to(dtype)) is rest
    torch.testing.assert_close(rest.float(), wanted + 1, rtol=tolerance, atol=4 * tolerance)


def test_head_layer_norm_has_a_weight_for_every_head() -> None:
    torch.manual_seed(0)
    weight, buffer = torch.rand(5, 8), torch.randn(3, 6, 8)
    before = buffer.clone()
    HeadLayerNorm(weight, None, 1e-5)(buffer[:, :5], NOBODY)
    assert torch.equal(buffer[:, 5], before[:, 5])
    for head in range(5):
        wanted = F.layer_norm(before[:, head], (8,), weight[head], None, 1e-5)
        torch.testing.assert_close(buffer[:, head], wanted)


def test_a_norm_goes_into_the_product_or_ahead_of_it() -> None:
    x = torch.randn(2, 8)
    rms = RMSNorm(torch.ones(8), 1e-5)
    assert before_product(rms, x) == (x, rms)
    assert before_product(None, x) == (x, None)
    norm = LayerNorm(torch.ones(8), None, 1e-5)
    y, before = before_product(norm, x)
    assert before is None
    assert torch.equal(y, norm(x))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("act", ["relu2", "gelu_new"])
def test_plain_mlp(tmp_path: Path, transposed: bool, act: str) -> None:
    torch.manual_seed(0)
    up, down, a, b = (torch.randn(s) for s in ((12, 8), (8, 12), (12,), (8,)))
    kept = [t.t().contiguous() if transposed else t for t in (up, down)]
    w = stored(tmp_path, u__weight=kept[0], d__weight=kept[1], u__bias=a, d__bias=b)
    mlp = MLP(w, "u", "d", hidden=8, inner=12, act=act, transposed=transposed)
    w.close()
    x, add = torch.randn(5, 8), torch.randn(5, 8)
    y = F.linear(x, up, a)
    y = F.relu(y) ** 2 if act == "relu2" else F.gelu(y, approximate="tanh")
    wanted = F.linear(y, down, b)
    torch.testing.assert_close(mlp(x, NOBODY), wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mlp(x, NOBODY, add), wanted + add, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_one_tensor_of_gates_and_ups(tmp_path: Path, rank: int) -> None:
    both, down = torch.randn(24, 8), torch.randn(8, 12)
    w = stored(tmp_path, gu__weight=both, d__weight=down)
    w.group = Group(rank, 2)
    rows = w.matrix(*gate_and_up(w, ["gu"], 8, 12))
    w.close()
    mine = slice(6 * rank, 6 * rank + 6)
    assert torch.equal(rows, torch.cat((both[:12][mine], both[12:][mine])))


@pytest.mark.parametrize("scale", [0.5, torch.rand(32)])
def test_scaled_logits_and_a_bias(tmp_path: Path, scale: Any) -> None:
    table, matrix, bias = torch.randn(32, 16), torch.randn(32, 16), torch.randn(32)
    w = stored(tmp_path, e__weight=table, h__weight=matrix, h__bias=bias)
    head = Head(w, "h", Embedding(w, "e", 32, 16), tied=False, scale=scale, bias=True)
    w.close()
    x, out = torch.randn(3, 16), torch.empty(3, 32)
    wanted = F.linear(x, matrix, bias) * scale
    torch.testing.assert_close(head(x, NOBODY), wanted, rtol=1e-5, atol=1e-5)
    assert head(x, NOBODY, None, out) is out
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_learned_positions(tmp_path: Path) -> None:
    table, places = torch.randn(8, 4), torch.randn(7, 4)
    w = stored(tmp_path, e__weight=table, p__weight=places)
    embed = LearnedPositions(w, Embedding(w, "e", 8, 4), "p", 5, 4, offset=2)
    w.close()
    batch: Any = SimpleNamespace(
        ids=torch.tensor([1, 3, 3]), positions=torch.tensor([0, 4, 9]), lora=None
    )
    assert torch.equal(embed(batch), table[[1, 3, 3]] + places[[2, 6, 6]])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("small", [0, 1 << 16])
def test_linear_joins_shards(
    tmp_path: Path,
    dtype: torch.dtype,
    bias: bool,
    rows: int,
    small: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "_SMALL", small)
    torch.manual_seed(0)
    a, b, bias_a, bias_b = (torch.randn(s) for s in ((16, 32), (24, 32), (16,), (24,)))
    values = {"a__weight": a, "b__weight": b}
    if bias:
        values |= {"a__bias": bias_a, "b__bias": bias_b}
    w = stored(tmp_path, dtype, **values)
    linear = Linear(w, Shard("a", 16, 32), Shard("b", 24, 32, rows=((8, 24),)), bias=bias)
    w.close()
    x, add = torch.randn(rows, 32).to(dtype), torch.randn(rows, 32).to(dtype)
    weight = torch.cat([a, b[8:]]).to(dtype).float()
    offset = torch.cat([bias_a, bias_b[8:]]).to(dtype).float() if bias else None
    wanted = F.linear(x.float(), weight, offset)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    kept = x.clone(), add.clone()
    torch.testing.assert_close(linear(x, NOBODY).float(), wanted, rtol=1e-2, atol=tolerance)
    torch.testing.assert_close(
        linear(x, NOBODY, add).float(), wanted + add.float(), rtol=1e-2, atol=tolerance
    )
    assert torch.equal(x, kept[0])
    assert torch.equal(add, kept[1])


@pytest.mark.parametrize("kind", [dense.Plain, dense.Packed])
@pytest.mark.parametrize("bias", [None, torch.randn(48)])
def test_forms_of_a_matrix_agree(kind: Any, bias: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 64)
    x, add = torch.randn(5, 64), torch.randn(5, 48)
    wanted = F.linear(x, weight, bias)
    torch.testing.assert_close(kind(weight, bias).matmul(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        kind(weight, bias).matmul(x, add), wanted + add, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("bias", [None, torch.randn(512).bfloat16()])
@pytest.mark.parametrize("rows", [1, 3, 4, 70])
@pytest.mark.parametrize(("emulated", "kept"), [(False, 0), (True, 0), (True, 1 << 20)])
def test_a_cpu_without_bf16_multiplies_many_rows_in_fp32(
    rows: int,
    emulated: bool,
    kept: int,
    bias: torch.Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dense, "emulates_bf16", lambda: emulated)
    monkeypatch.setattr(dense, "_KEPT", kept)
    monkeypatch.setattr(dense, "_SMALL_ROW", 0)
    widened: list[int] = []
    torch.manual_seed(0)
    weight = torch.randn(512, 64).bfloat16()
    x, add = torch.randn(rows, 64).bfloat16(), torch.randn(rows, 512).bfloat16()
    form = dense.Packed(weight, bias)
    inner = form._wide
    monkeypatch.setattr(form, "_wide", lambda x, add: widened.append(len(x)) or inner(x, add))
    wanted = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    torch.testing.assert_close(form.matmul(x).double(), wanted, rtol=1e-2, atol=2e-2)
    total = form.matmul(x, add.clone())
    torch.testing.assert_close(total.double(), wanted + add.double(), rtol=2e-2, atol=6e-2)
    assert bool(widened) == (emulated and rows >= 4)


def test_a_dtype_that_cannot_be_packed_is_multiplied_plainly() -> None:
    assert isinstance(dense.lay_out(torch.randn(4, 4).half()), dense.Plain)


def test_a_packed_matrix_is_held_once() -> None:
    weight = torch.randn(256, 256)
    packed: Any = dense.Packed(weight, None)
    held = [v for v in vars(packed).values() if isinstance(v, torch.Tensor)]
    assert len(held) == 1
    assert held[0].is_mkldnn


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_tied_head_with_and_without_a_copy(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_COPY_BYTES", limit)
    monkeypatch.setattr(dense, "_SMALL", 0)
    table = torch.randn(32, 16)
    w = stored(tmp_path, e__weight=table)
    embed = Embedding(w, "e", 32, 16)
    head = Head(w, "lm_head", embed, tied=True)
    w.close()
    x = torch.randn(3, 16)
    torch.testing.assert_close(head(x, NOBODY), x @ table.t(), rtol=1e-5, atol=1e-5)
    assert head.copy_bytes == (table.nbytes if limit and dense.packs(torch.float32) else 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_logits_are_raw_until_they_are_capped(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(32, 16)
    w = stored(tmp_path, dtype, e__weight=table)
    head = Head(w, "lm_head", Embedding(w, "e", 32, 16), tied=True, softcap=3.0)
    w.close()
    x = torch.randn(3, 16)
    raw = head(x.to(dtype), NOBODY, None, torch.empty(3, 32, dtype=dtype))
    wanted, tolerance = x @ table.t(), 1e-5 if dtype is FLOATS[0] else 0.1
    assert raw.dtype is dtype
    torch.testing.assert_close(raw.float(), wanted, rtol=0.0, atol=tolerance)
    logits = head.capped(raw)
    assert (head.softcap, logits.dtype) == (3.0, torch.float32)
    torch.testing.assert_close(logits, 3.0 * torch.tanh(wanted / 3.0), rtol=0.0, atol=tolerance)


def test_embedding_scale_is_rounded_to_the_dtype(tmp_path: Path) -> None:
    w = stored(tmp_path, torch.bfloat16, e__weight=torch.ones(4, 8))
    batch: Any = SimpleNamespace(ids=torch.tensor([1, 3]), lora=None)
    x = Embedding(w, "e", 4, 8, scale=3072**0.5)(batch)
    w.close()
    assert float(x[0, 0]) == 55.5  # sqrt(3072) = 55.43


@pytest.mark.parametrize(
    ("act", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
    ],
)
def test_gated_mlp(tmp_path: Path, act: str, function: Any) -> None:
    torch.manual_seed(0)
    gate, up, down = torch.randn(12, 8), torch.randn(12, 8), torch.randn(8, 12)
    w = stored(tmp_path, g__weight=gate, u__weight=up, d__weight=down)
    mlp = GatedMLP(w, ("g", "u"), "d", hidden=8, inner=12, act=act)
    w.close()
    batch = NOBODY
    x, add = torch.randn(5, 8), torch.randn(5, 8)
    wanted = (function(x @ gate.t()) * (x @ up.t())) @ down.t()
    torch.testing.assert_close(mlp(x, batch), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mlp(x, batch, add), wanted + add, rtol=1e-4, atol=1e-4)


class Gating(dense.Plain):
    """A weight of up to 4 rows that makes of gates and ups what the next one wants."""

    def gates(self, rows: int) -> bool:
        return rows <= 4

    def matmul(self, x: torch.Tensor, *others: Any, **fused: Any) -> torch.Tensor:
        return skinny.linear(x, self.weight, **fused)


def test_gated_mlp_on_a_product_that_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product makes the gates of few rows, and no gate is made behind it again; of more rows,
    and of rows with adapters, which come first, it makes none."""
    torch.manual_seed(0)
    both, down = torch.randn(24, 8), torch.randn(8, 12)
    w = stored(tmp_path, g__weight=both[:12], u__weight=both[12:], d__weight=down)
    mlp = GatedMLP(w, ("g", "u"), "d", hidden=8, inner=12, act="silu")
    w.close()
    monkeypatch.setattr(mlp._gate_up, "_weight", Gating(both, None))
    monkeypatch.setattr(mlp._down, "_weight", dense.Plain(down, None))
    made: list[int] = []
    gate = type(mlp._gate).__call__
    monkeypatch.setattr(
        type(mlp._gate), "__call__", lambda self, x: made.append(len(x)) or gate(self, x)
    )
    x = torch.randn(5, 8)
    wanted = F.silu(x @ both[:12].t()) * (x @ both[12:].t()) @ down.t()
    for rows in (4, 5):
        found = mlp(x[:rows], NOBODY)
        torch.testing.assert_close(found, wanted[:rows], rtol=1e-4, atol=1e-4)
    assert made == [5]
    assert not mlp._gate_up.gates(x[:4], SimpleNamespace(lora=object()))  # type: ignore[arg-type]
