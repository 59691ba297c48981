"""Codes on a CUDA device say what their values say on CPU: rounded as they are read, and stored.

Kernels of codes take rows in 16 bits.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun.runtime.config import QUANTIZE
from tests.gpu.beside import DEVICE, Asked, check_16, say
from tests.runtime.models import coded, zoo

pytestmark = pytest.mark.gpu

DTYPES = ["float32"] if DEVICE == "cpu" else ["bfloat16", "float16"]
MODELS = {
    "llama": "biases",
    "qwen3": "tied",  # one matrix of 8 bits is embedding and head
    "mixtral": "plain",
    "granitemoehybrid": "experts",  # in one tensor
    "deepseek_v3": "plain",
}
STORED = list(itertools.chain.from_iterable(coded.FORMS.values()))
# Rows from which e4m3 multiplies e4m3 on a Hopper GPU, whose rows lose bits then; and how much.
EIGHT, LOST = 32, 40.0
Folder = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """(family, dtype) -> a checkpoint stored in it, so that nothing but codes is rounded."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, dtype: str) -> Path:
        if (family, dtype) not in made:
            folder = made[family, dtype] = tmp_path_factory.mktemp("model")
            zoo.make(folder, family, MODELS[family])
            kept = getattr(torch, dtype)
            zoo.edit_tensors(folder, lambda tensors: {n: t.to(kept) for n, t in tensors.items()})
        return made[family, dtype]

    return make


def check(name: str, folder: Path, plain: Path, dtype: str, **options: Any) -> None:
    further = {"further": options.pop("further")} if "further" in options else {}
    wanted = say(Asked(plain), "cpu")
    usual = say(Asked(plain), "cpu", dtype=dtype)
    found = say(Asked(folder), DEVICE, dtype=dtype, **options)
    check_16(f"{name}, {dtype}", found, wanted, usual, **further)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", QUANTIZE)
@pytest.mark.parametrize("family", MODELS)
def test_rounded_as_it_is_read(
    model: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    way: str,
    dtype: str,
) -> None:
    coded.exactly(monkeypatch)
    folder = model(family, dtype)
    values = coded.rounded(folder, family, way, DEVICE)
    plain = coded.copied(folder, tmp_path / "plain", values)
    few = {"max_num_batched_tokens": EIGHT // 2}
    check(f"{family} in {way}", folder, plain, dtype, quantize=way, **few)
    if way == "fp8" and dtype == "bfloat16":
        check(f"{family} in {way}, many rows", folder, plain, dtype, quantize=way, further=LOST)


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize(("family", "dtype"), [("llama", DTYPES[0]), ("mixtral", DTYPES[-1])])
def test_stored(
    model: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dtype: str,
    form: str,
) -> None:
    coded.exactly(monkeypatch)
    folder = model(family, "float32")
    said, files, values = coded.stored(folder, family, form)
    plain = coded.copied(folder, tmp_path / "plain", values)
    found = coded.copied(folder, tmp_path / "coded", files, said)
    check(f"{family}, {form}", found, plain, dtype, max_num_batched_tokens=EIGHT // 2)
