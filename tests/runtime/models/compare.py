"""How far a driver's logits are from those of transformers."""

import random
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tests.runtime.driver import Driver

TOLERANCE = 1e-4  # the promise is 1e-3; what is measured lies below 2e-5
LONG, SHORT = 23, 9  # tokens; longer than the windows


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(128) for _ in range(length)]


# What oracles have said: many tests ask one the same.
_SAID: WeakKeyDictionary[Any, dict[tuple[int, ...], torch.Tensor]] = WeakKeyDictionary()


@torch.inference_mode()
def reference(oracle: Any, ids: list[int]) -> torch.Tensor:
    said = _SAID.setdefault(oracle, {})
    if tuple(ids) not in said:
        said[tuple(ids)] = oracle(torch.tensor([ids]), use_cache=False).logits[0].float()
    return said[tuple(ids)]


def greedy(oracle: Any, start: list[list[int]], found: list[list[int]], **given: Any) -> Any:
    """What `oracle` answers behind prompts of one length, once every token of `found` that is
    before is known to be its own: where all are the same, this is its greedy answer."""
    ids = torch.tensor([a + b[:-1] for a, b in zip(start, found, strict=True)])
    name = "decoder_input_ids" if given else "input_ids"
    with torch.inference_mode():
        logits = oracle(**{name: ids}, **given, use_cache=False).logits
    return logits[:, len(start[0]) - 1 :].argmax(-1).tolist()


def worst(found: list[torch.Tensor], expected: torch.Tensor) -> float:
    return float((torch.cat(found) - expected).abs().max())


def stepwise(driver: Driver, oracle: Any, shift: int = 0) -> float:
    """Largest difference over a ragged prefill and the steps that follow it, token by token."""
    a, b = prompt(1, LONG), prompt(2, SHORT)
    rows = [[x] for x in driver.step([(0, a[:-4]), (1, b[:-4])])]
    for back in range(-4, 0):
        for row, logits in zip(
            rows, driver.step([(0, [a[back]]), (1, [b[back]])], shift), strict=True
        ):
            row.append(logits)
    return max(worst(rows[0], reference(oracle, a)), worst(rows[1], reference(oracle, b)))
