"""Tables of angles, and norm, rotation and store in one: against the layers they stand for."""

import math
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.kernels import rotary as twin
from kvrun.runtime.kernels.native import rotary as native
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.triton import rotary as triton
from kvrun.runtime.layers.norm import RMSNorm
from kvrun.runtime.layers.position import Rope, scaled_frequencies

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Norm, rotation and tables are each rounded in the layers, which also round the tables.
STEPS = {torch.float32: 4e-6, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
FP8 = torch.float8_e4m3fn
HEADS, KV, EPS = 5, 2, 1e-6


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with DEVICE:
        yield


FORMS = {"twin": twin, "triton": triton}
if DEVICE.type == "cpu" and native.available():
    FORMS["native"] = native


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def frequencies(width: int) -> torch.Tensor:
    return 10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)


def buffer(tokens: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    width = (HEADS + 2 * KV) * head_dim
    return torch.randn(tokens, width + 16).to(dtype)[:, :width]


def call(
    kernel: ModuleType,
    qkv: torch.Tensor,
    slots: list[int],
    cache: torch.Tensor,
    head_dim: int,
    *,
    width: int = 0,
    interleaved: bool = False,
    positions: torch.Tensor | None = None,
    **norm: Any,
) -> None:
    rotation = Rotation(interleaved=interleaved, **norm)
    if positions is not None:
        cos, sin = kernel.tables(positions, frequencies(width), 1.0)
        rotation = rotation._replace(cos=cos, sin=sin)
    kernel.rotate_append(qkv, rotation, cache, torch.tensor(slots), KV, head_dim)


@pytest.mark.parametrize("tokens", [1, 4, 300])
@pytest.mark.parametrize("half", [1, 12, 64])
def test_tables(kernel: ModuleType, tokens: int, half: int) -> None:
    """Large angles keep all their digits: the wanted values are Python's, of the fp32 product."""
    positions = torch.randint(0, 1_000_000, (tokens,))
    positions[0] = 999_983
    of = frequencies(2 * half)
    cos, sin = kernel.tables(positions, of, 1.25)
    angles = (positions[:, None].float() * of).tolist()
    for found, function in ((cos, math.cos), (sin, math.sin)):
        wanted = torch.tensor([[1.25 * function(angle) for angle in row] for row in angles])
        assert found.dtype is torch.float32
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=3e-7)


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "part"), [(16, 1.0), (20, 0.7), (80, 0.4)])
@pytest.mark.parametrize("normed", [False, True])
def test_as_the_layers_do(
    kernel: ModuleType,
    dtype: torch.dtype,
    interleaved: bool,
    head_dim: int,
    part: float,
    normed: bool,
) -> None:
    positions, slots, turned = torch.tensor([0, 17, 40, 3]), [6, 0, 11, 5], HEADS + KV
    qkv, width = buffer(4, head_dim, dtype), int(head_dim * part)
    cache = torch.full((12, 2 * KV * head_dim + 8), 7.0, dtype=dtype)[:, 4:-4]
    outside = qkv._base[:, qkv.shape[1] :].clone()
    wanted = qkv.clone().view(4, -1, head_dim)
    qk, norm = wanted[:, :turned], {}
    if normed:
        q, k = torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5
        norm = {"q_weight": q, "k_weight": k, "eps": EPS}
        RMSNorm(torch.cat((q.expand(HEADS, -1), k.expand(KV, -1))), EPS)(qk, out=qk)
    parameters = HFConfig(
        {"model_type": "x", "rope_parameters": {"partial_rotary_factor": part}}
    ).rope()
    torch.testing.assert_close(
        scaled_frequencies(parameters, width)[0].to(DEVICE), frequencies(width)
    )
    rope = Rope(parameters, head_dim, dtype, DEVICE, interleaved=interleaved)
    rope(qk, SimpleNamespace(positions=positions, shared={}))  # type: ignore[arg-type]

    call(kernel, qkv, slots, cache, head_dim, width=width, interleaved=interleaved,
         positions=positions, **norm)  # fmt: skip
    step = STEPS[dtype]
    torch.testing.assert_close(qkv, wanted.flatten(1), rtol=step, atol=step)
    # What is kept is what was written back, to the bit; no other row is touched.
    assert torch.equal(cache[slots], qkv[:, HEADS * head_dim :])
    assert torch.equal(qkv[:, turned * head_dim :], wanted[:, turned:].flatten(1))
    others = [slot for slot in range(12) if slot not in slots]
    assert (cache[others] == 7).all()
    assert (cache._base[:, :4] == 7).all()
    assert (cache._base[:, -4:] == 7).all()
    assert torch.equal(qkv._base[:, qkv.shape[1] :], outside)


def test_norm_comes_before_rotation_and_is_rounded(kernel: ModuleType) -> None:
    """At position 0 nothing turns: what remains is the norm, in the dtype."""
    qkv, ones = buffer(2, 16, torch.float16), torch.ones(16)
    wanted = RMSNorm(ones, EPS)(qkv.reshape(2, -1, 16)[:, : HEADS + KV])
    cache = torch.zeros(4, 64, dtype=torch.float16)
    call(kernel, qkv, [0, 1], cache, 16, width=16, positions=torch.tensor([0, 0]),
         q_weight=ones, k_weight=ones, eps=EPS)  # fmt: skip
    torch.testing.assert_close(qkv.reshape(2, -1, 16)[:, : HEADS + KV], wanted, rtol=1e-3, atol=0)


def test_without_positions_only_the_store_remains(kernel: ModuleType) -> None:
    qkv = buffer(3, 20, torch.bfloat16)
    before, cache = qkv.clone(), torch.zeros(5, 80, dtype=torch.bfloat16)
    call(kernel, qkv, [2, 0, 4], cache, 20)
    assert torch.equal(qkv, before)
    assert torch.equal(cache[[2, 0, 4]], before[:, HEADS * 20 :])
    assert not cache[[1, 3]].any()


def test_negative_slots_store_nothing_but_are_rotated(kernel: ModuleType) -> None:
    qkv = buffer(3, 16, torch.float32)
    qkv[1:] = qkv[0]
    cache, positions = torch.zeros(4, 64), torch.tensor([9, 9, 9])
    call(kernel, qkv, [-1, 2, -1], cache, 16, width=16, positions=positions)
    assert torch.equal(qkv[0], qkv[1])
    assert torch.equal(cache[2], qkv[0, HEADS * 16 :])
    assert not cache[[0, 1, 3]].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stays_in_its_head_and_pair(kernel: ModuleType) -> None:
    qkv = buffer(1, 16, torch.float32)
    qkv[0, 3], qkv[0, 16 + 12] = float("nan"), float("inf")
    call(kernel, qkv, [0], torch.zeros(1, 64), 16, width=8, positions=torch.tensor([5]))
    bad = (~qkv[0].isfinite()).nonzero().ravel().tolist()
    assert bad == [3, 7, 16 + 12]  # behind the rotated width a dim has no partner


@pytest.mark.parametrize("dtype", STEPS)
def test_fp8_rounds_what_was_written_back_and_saturates(
    kernel: ModuleType, dtype: torch.dtype
) -> None:
    """Values that fp8 holds exactly: Triton's interpreter rounds others wrongly."""
    exact = torch.arange(-112, 127).to(torch.uint8).view(FP8)
    exact = exact[exact.float().isfinite() & (exact.float().abs() >= 2.0**-6)].to(dtype)
    qkv = exact[torch.randint(0, len(exact), (2, 16 * (HEADS + 2 * KV)))]
    before = qkv.clone()
    before[:, -5], before[:, -4], before[:, -3] = 449, -3e4, 448
    qkv[:, -5], qkv[:, -4], qkv[:, -3] = 449, -3e4, 448
    cache = torch.zeros(3, 64, dtype=torch.uint8).view(FP8)
    call(kernel, qkv, [2, 0], cache, 16, width=16, positions=torch.tensor([0, 0]))
    assert torch.equal(qkv, before)
    wanted = before[:, HEADS * 16 :].float().clamp(-448, 448)
    assert torch.equal(cache.float()[[2, 0]], wanted)
    assert not cache.float()[1].any()
