"""What a GPU runs of every family, as far as a CPU can show it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvrun.runtime import device
from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.attention.triton import Attention as Triton
from kvrun.runtime.layers import attention, mlp, moe, norm
from tests.runtime.driver import Driver
from tests.runtime.models import zoo
from tests.runtime.models.compare import TOLERANCE, stepwise

# Operators that wait for the device, or whose results have sizes that only the device knows.
_WAIT = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "unique",
    "repeat_interleave",
)


def test_the_order_of_kernels_gives_the_same_logits(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA one kernel norms, rotates and stores, others attend; their twins in torch stand for
    them here."""
    for module in (attention, mlp, norm):
        monkeypatch.setattr(module, "fused", device.kernel)
    folder, oracle = model
    assert stepwise(Driver(folder, backend_type=Triton), oracle) <= TOLERANCE


@pytest.mark.parametrize(("family", "variant"), [("llama", "v3.1"), ("qwen3", "tied")])
def test_without_a_compiler(
    models: Any, family: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers norm, rotate and store one after the other then."""
    monkeypatch.setattr(attention, "fused", lambda name, on: None)
    folder, oracle = models(family, variant)
    assert stepwise(Driver(folder), oracle) <= TOLERANCE


class Watch(TorchDispatchMode):
    """Notes operators that cannot be captured in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype is torch.bool for i in args[1])
        if name in _WAIT or masked:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Blind:
    """A backend that attends to nothing, as kernels are not what is watched."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def attend(self, spec: AttentionSpec, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return q.reshape(len(q), -1)[:, : spec.out]

    def attend_new(self, *args: Any) -> None:
        return None


class Passing:
    """In the place of the experts' kernel."""

    @staticmethod
    def experts(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x.clone()


def test_a_step_never_waits_for_the_device(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "kernel", lambda *args: Passing)
    driver = Driver(model[0])
    driver.step([(0, [1, 2, 3]), (1, [4])])
    batch = driver.batch([(0, [5]), (1, [6])])
    batch.backend = Blind(driver.backend.cache)  # type: ignore[assignment]
    with torch.no_grad(), Watch() as watch:
        driver.model(batch)
    assert watch.seen == []


def test_positions_past_the_end_of_a_table_are_read_from_its_end(tmp_path: Path) -> None:
    """A captured step runs a few turns past a sequence's end; what it draws there is dropped."""

    for family in ("gpt2", "opt"):
        zoo.make(tmp_path / family, family, next(iter(zoo.VARIANTS[family])))
        driver = Driver(tmp_path / family)
        batch = driver.batch([(0, [5])], shift=300)
        assert torch.isfinite(driver.model(batch)).all()
