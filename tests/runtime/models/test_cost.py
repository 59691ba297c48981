"""What a layer costs in operators: a model of small matrices spends its time between them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvrun.runtime.kernels.native import skinny
from kvrun.runtime.quant import _small
from tests.runtime.driver import Driver
from tests.runtime.models import zoo

LIMIT = 20
# Neither views nor memory that is only asked for do any work.
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view")


class Count(TorchDispatchMode):
    """Counts operators, composed ones taken apart, those that only give a view left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in _FREE:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(folder: Path, layers: int, dtype: torch.dtype, sequences: int) -> Counter[str]:
    zoo.make(folder, "llama", "v3", num_hidden_layers=layers)
    driver = Driver(folder, dtype=dtype)
    driver.step([(i, [1, 2, 3, 4, 5]) for i in range(sequences)])
    batch = driver.batch([(i, [6]) for i in range(sequences)])
    # Inference mode would count composed operators as one; gradients are off all the same.
    with torch.no_grad(), Count() as count:
        driver.model(batch)
    return count.seen


def of_a_layer(folder: Path, dtype: torch.dtype, sequences: int) -> Counter[str]:
    two = operators(folder / "2", 2, dtype, sequences)
    three = operators(folder / "3", 3, dtype, sequences)
    return three - two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_layer_takes_at_most_20_operators(
    tmp_path: Path, dtype: torch.dtype, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_small, "takes", lambda weight: False)
    layer = of_a_layer(tmp_path, dtype, sequences)
    assert sum(layer.values()) > 5
    assert sum(layer.values()) <= LIMIT, layer


@pytest.mark.skipif(not skinny.available(), reason="there is no C compiler here")
@pytest.mark.parametrize(("dtype", "sequences"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_products_in_c_take_in_norms_gates_and_sums(
    tmp_path: Path, dtype: torch.dtype, sequences: int
) -> None:
    layer = of_a_layer(tmp_path, dtype, sequences)
    assert sum(layer.values()) <= 3, layer  # keys and values are gathered, and attended
