"""Heads in 8 bits: what `quantize` makes of the matrix that gives logits, tied or not."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun import folder
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.device import TRITON
from kvrun.runtime.kernels import w4a16
from kvrun.runtime.models import baichuan, build
from kvrun.runtime.quant import _coded, _cpu, _cuda, _round
from tests.runtime.driver import Driver
from tests.runtime.models import seq2seq, test_baichuan, zoo
from tests.runtime.models.compare import prompt, reference
from tests.runtime.test_parallel import Threads

VOCAB, HIDDEN = 128, 64  # of the small models


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Each row's values to the nearest of 255 steps, of which its largest value has 127.5."""
    step = weight.abs().amax(1, keepdim=True) * (2 / 255)
    return (weight / step).round().clamp(-128, 127) * step


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got.double() - ref.double()).norm() / ref.double().norm())


@pytest.fixture
def only_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else stays plain, so that logits tell of the head."""
    monkeypatch.setattr(_round, "stays", lambda shard: True)


@pytest.fixture(params=["native", "torch"])
def form(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """With a compiler, and without."""
    if request.param == "torch":
        monkeypatch.setattr(_cpu, "native", lambda name: None)
    return str(request.param)


FAMILIES = [("llama", "v2"), ("llama", "v3.1"), ("gemma2", "plain"), ("cohere", "plain"),
            ("phi", "2"), ("gptj", "plain"), ("gpt2", "plain"), ("opt", "350m")]  # fmt: skip


@pytest.mark.usefixtures("only_heads")
@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_logits_are_those_of_rounded_rows(
    tmp_path: Path, form: str, family: str, variant: str
) -> None:
    """As transformers computes them from rows rounded by hand: tied and not, with a bias, a cap, a
    scale, narrower than the layers."""
    oracle = zoo.make(tmp_path, family, variant)
    plain = reference(copy.deepcopy(oracle), prompt(1, 9))  # what it says is kept with it
    head = oracle.get_output_embeddings().weight
    head.data = rounded(head.data)
    wanted = reference(oracle, prompt(1, 9))
    for size in (9, 1):  # rows at once
        driver, ids = Driver(tmp_path, quantize="int4"), prompt(1, 9)
        got = torch.cat([driver.step([(0, ids[at : at + size])])[0] for at in range(0, 9, size)])
        assert off(got, wanted) < 1e-2
        assert off(got, wanted) < 0.9 * off(got, plain)


@pytest.mark.usefixtures("only_heads")
@pytest.mark.parametrize("variant", ["v1.0", "flan"])
def test_behind_an_encoder(tmp_path: Path, variant: str) -> None:
    """T5's is tied and scaled, and read by both halves; Flan's is not."""
    oracle = seq2seq.make(tmp_path, "t5", variant)
    head = oracle.get_output_embeddings().weight
    head.data = rounded(head.data)
    driver = seq2seq.EncodedDriver(tmp_path, quantize="int8")
    driver.begin(0, prompt(1, 12))
    target = [0, *prompt(2, 5)]
    got = driver.step([(0, target)])[0]
    assert off(got, seq2seq.reference(oracle, prompt(1, 12), target)) < 1e-2


@pytest.mark.usefixtures("only_heads")
def test_rows_that_are_normed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baichuan 2: lengths are those of the rows in the file."""
    monkeypatch.setattr(baichuan, "NORMED_VOCAB", test_baichuan.VOCAB)
    test_baichuan.make(tmp_path)
    ids = prompt(1, 9)
    plain = Driver(tmp_path).step([(0, ids)])[0]
    got = Driver(tmp_path, quantize="int8").step([(0, ids)])[0]
    assert 0 < off(got, plain) < 2e-2


def test_two_ranks_and_one(tmp_path: Path) -> None:
    zoo.make(tmp_path, "llama", "v3.1")
    work = [[(0, prompt(1, 9))], [(0, [5])]]

    def logits(**options: Any) -> torch.Tensor:
        driver = Driver(tmp_path, quantize="int8", **options)
        return torch.cat([driver.step(step)[0] for step in work])

    barrier, places = threading.Barrier(2), [torch.empty(0)] * 2
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(lambda r: logits(group=Threads(r, 2, barrier, places)), (0, 1)))
    assert torch.equal(*ranks)
    assert off(ranks[0], logits()) < 3e-2


@pytest.mark.usefixtures("only_heads")
@pytest.mark.parametrize("variant", ["v2", "v3.1"])
def test_bytes_are_counted(tmp_path: Path, form: str, variant: str) -> None:
    """A byte a value and 4 a row (6 in torch's form), once where it is tied; the plain embedding is
    let go of."""
    zoo.make(tmp_path, "llama", variant)
    plain, small = (build(Checkpoint(tmp_path, quantize=q)) for q in (None, "int8"))
    matrix = VOCAB * HIDDEN
    once = matrix * 4 * (2 if plain._head.copy_bytes else 1)
    saved = plain.parameter_bytes - small.parameter_bytes
    assert saved == once - (matrix + {"native": 4, "torch": 6}[form] * VOCAB)
    tied: Any = small._embedding
    assert (tied.weight is None) is (variant == "v3.1")


def test_a_head_that_codes_would_not_make_smaller_stays(tmp_path: Path) -> None:
    """e4m3 becomes values again on CPU: then nothing is rounded."""
    zoo.make(tmp_path, "llama", "v3.1")
    plain, fp8 = (build(Checkpoint(tmp_path, quantize=q)) for q in (None, "fp8"))
    tied: Any = fp8._embedding
    assert torch.equal(tied.weight, plain._embedding.weight)  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_rows_are_looked_up_on_a_gpu(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "kernel", lambda name, device: folder.load(TRITON, name))
    made = _round.coded(torch.randn(40, 192), method)
    values, ids = w4a16.dequantise(made, torch.float32), torch.tensor([39, 0, 7, 7])
    assert torch.equal(_cuda.Fused(made, None).rows(ids, torch.float32), values[ids])
    assert _coded.fuses(made, torch.bfloat16)
