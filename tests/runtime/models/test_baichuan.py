"""Baichuan, which transformers does not have, against its published arithmetic."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kvrun.runtime import device
from kvrun.runtime.attention.triton import Attention as Triton
from kvrun.runtime.layers import attention, mlp, norm
from kvrun.runtime.models import baichuan
from tests.runtime.driver import Driver
from tests.runtime.models import test_ranks
from tests.runtime.models.compare import TOLERANCE, prompt

HIDDEN, HEADS, INNER, VOCAB, LAYERS, EPS = 96, 6, 80, 128, 2, 1e-5
DIM = HIDDEN // HEADS
CONFIG = {
    "model_type": "baichuan", "hidden_size": HIDDEN, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "vocab_size": VOCAB, "num_hidden_layers": LAYERS,
    "rms_norm_eps": EPS, "model_max_length": 64, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def make(folder: Path) -> Tensors:
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN)}
    norms = ["model.norm"]
    for n in range(LAYERS):
        p = f"model.layers.{n}"
        norms += [f"{p}.input_layernorm", f"{p}.post_attention_layernorm"]
        shapes |= {
            f"{p}.self_attn.W_pack": (3 * HIDDEN, HIDDEN),
            f"{p}.self_attn.o_proj": (HIDDEN, HIDDEN),
            f"{p}.mlp.gate_proj": (INNER, HIDDEN),
            f"{p}.mlp.up_proj": (INNER, HIDDEN),
            f"{p}.mlp.down_proj": (HIDDEN, INNER),
        }
    tensors = {f"{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": 1 + 0.1 * torch.randn(HIDDEN) for name in norms}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight


def rotated(x: torch.Tensor) -> torch.Tensor:
    """x [heads, tokens, DIM], the first half of a head paired with the second."""
    angles = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(0, DIM, 2) / DIM)
    cos, sin = torch.cat((angles, angles), 1).cos(), torch.cat((angles, angles), 1).sin()
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def slopes() -> torch.Tensor:
    """As get_slopes of the published file: of 4 heads, then every second of 8."""
    four = [2.0 ** -(2 * i) for i in (1, 2, 3, 4)]
    eight = [2.0**-i for i in range(1, 9)]
    return torch.tensor(four + eight[0::2][:2])


def published(t: Tensors, ids: list[int], *, rope: bool, normed: bool) -> torch.Tensor:
    x = t["model.embed_tokens.weight"][ids]
    length = len(ids)
    steps = torch.arange(length)
    mask = torch.full((length, length), -math.inf).triu(1)
    if not rope:
        mask = mask + slopes().view(-1, 1, 1) * (steps[None, :] - steps[:, None])
    for n in range(LAYERS):
        p = f"model.layers.{n}"
        y = rms(x, t[f"{p}.input_layernorm.weight"]) @ t[f"{p}.self_attn.W_pack.weight"].T
        q, k, v = y.view(length, 3, HEADS, DIM).permute(1, 2, 0, 3)
        if rope:
            q, k = rotated(q), rotated(k)
        weights = (q @ k.transpose(1, 2) / math.sqrt(DIM) + mask).softmax(-1)
        y = (weights @ v).transpose(0, 1).reshape(length, HIDDEN)
        x = x + y @ t[f"{p}.self_attn.o_proj.weight"].T
        y = rms(x, t[f"{p}.post_attention_layernorm.weight"])
        gate = F.silu(y @ t[f"{p}.mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ t[f"{p}.mlp.up_proj.weight"].T)) @ t[f"{p}.mlp.down_proj.weight"].T
    head = t["lm_head.weight"]
    return rms(x, t["model.norm.weight"]) @ (F.normalize(head) if normed else head).T


def difference(driver: Driver, expected: torch.Tensor, ids: list[int]) -> float:
    found = driver.step([(0, ids[:-3])])
    for token in ids[-3:]:
        found += driver.step([(0, [token])])
    return float((torch.cat(found) - expected).abs().max())


def test_64_greedy_tokens(tmp_path: Path) -> None:
    tensors, ids = make(tmp_path), prompt(2, 9)
    driver, start = Driver(tmp_path), len(ids)
    rows = driver.step([(0, ids)])
    found: list[int] = []
    for _ in range(64):
        found.append(int(rows[0][-1].argmax()))
        ids.append(int(published(tensors, ids, rope=False, normed=False)[-1].argmax()))
        rows = driver.step([(0, found[-1:])])
    assert found == ids[start:]


def test_chunks_beside_decodes_and_a_shared_prefix(tmp_path: Path) -> None:
    tensors, driver = make(tmp_path), Driver(tmp_path)
    a, b = prompt(3, 21), prompt(4, 16)
    c = a[:8] + prompt(5, 9)
    rows = {n: driver.step([(n, ids[:9])]) for n, ids in enumerate((a, b))}
    driver.share(0, 2, 8)
    rows[2] = [published(tensors, c, rope=False, normed=False)[:8]]
    for work in ([(0, a[9:10]), (1, b[9:]), (2, c[8:13])], [(2, c[13:]), (0, a[10:])]):
        for (n, _), logits in zip(work, driver.step(work), strict=True):
            rows[n].append(logits)
    for n, ids in enumerate((a, b, c)):
        wanted = published(tensors, ids, rope=False, normed=False)
        assert (torch.cat(rows[n]) - wanted).abs().max() <= TOLERANCE


def test_two_ranks_are_one_model(tmp_path: Path) -> None:
    make(tmp_path)
    whole = test_ranks.logits(Driver(tmp_path))
    for part in test_ranks.ranks(tmp_path):
        assert (part - whole).abs().max() <= TOLERANCE


def test_the_order_of_kernels_gives_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, ids = make(tmp_path), prompt(1, 23)
    for module in (attention, mlp, norm):
        monkeypatch.setattr(module, "fused", device.kernel)
    expected = published(tensors, ids, rope=False, normed=False)
    assert difference(Driver(tmp_path, backend_type=Triton), expected, ids) <= TOLERANCE


@pytest.mark.parametrize("normed", [False, True], ids=["1", "2"])
@pytest.mark.parametrize("rope", [False, True], ids=["13b", "7b"])
def test_published_arithmetic(
    tmp_path: Path, rope: bool, normed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, ids = make(tmp_path), prompt(1, 23)
    monkeypatch.setattr(baichuan, "ROTATED_HIDDEN", HIDDEN if rope else 4096)
    monkeypatch.setattr(baichuan, "NORMED_VOCAB", VOCAB if normed else 125696)
    expected = published(tensors, ids, rope=rope, normed=normed)
    assert difference(Driver(tmp_path), expected, ids) <= TOLERANCE
    for other in ((not rope, normed), (rope, not normed)):  # mistaken for another
        wrong = published(tensors, ids, rope=other[0], normed=other[1])
        assert difference(Driver(tmp_path), wrong, ids) > 100 * TOLERANCE
