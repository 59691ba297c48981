"""An adapter on every product of every family says what weights with its changes say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runtime.lora import adapters
from tests.runtime.lora.test_parity import FORMS
from tests.runtime.models import coded, every
from tests.runtime.models.compare import TOLERANCE

Models = Callable[[str, str], tuple[Path, Any]]


def write(folder: Path, place: Path, family: str) -> Path:
    """A model with the changes of an adapter at `place`/merged; the adapter, `place`/adapter."""
    files = load_file(folder / "model.safetensors")
    names = [n for n in coded.matrices(files) if ".experts." not in n]
    back = {
        n.removesuffix(".weight"): coded.turned(n, family) for n in names if not coded.routes(n)
    }
    matrices = {n: files[f"{n}.weight"].t() if back[n] else files[f"{n}.weight"] for n in back}
    sizes: dict[str, Any] = {n: tuple(matrix.shape) for n, matrix in matrices.items()}
    for name, change in adapters.write(place / "adapter", sizes).items():
        files[f"{name}.weight"] += change.t() if back[name] else change
    return coded.copied(folder, place / "merged", files)


def difference(folder: Path, place: Path, family: str, form: str) -> tuple[float, float]:
    """How far the adapter's logits, and those beside them of the base, are from what they should
    be; and how far they are from each other's."""
    merged = every.logits(every.driver(write(folder, place, family), family))
    base = every.logits(every.driver(folder, family))
    runs = every.driver(folder, family)
    runs.bank.register("it", str(place / "adapter"))
    found = every.logits(runs, "it", form)
    first = every.rows_of_the_first(family)
    wanted = torch.where(first[:, None], merged, base)
    return float((found - wanted).abs().max()), float((found - base)[first].abs().max())


@pytest.mark.parametrize(
    ("family", "variant", "form"),
    [(*model, FORMS[n % len(FORMS)]) for n, model in enumerate(every.variants())],
)
def test_all_products_change_beside_the_base(
    models: Models, tmp_path: Path, family: str, variant: str, form: str
) -> None:
    folder = every.folder(models, tmp_path, family, variant)
    off, moved = difference(folder, tmp_path, family, form)
    assert off <= TOLERANCE
    assert moved > 0.1
