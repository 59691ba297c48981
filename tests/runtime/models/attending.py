"""A driver of models that attend to images, and prompts in which every rule about them matters."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvrun.runtime.batch import Batch
from kvrun.runtime.engine.features import Features
from kvrun.runtime.engine.reader import Reader
from kvrun.runtime.engine.request import Request
from kvrun.runtime.engine.scheduler import Row
from kvrun.runtime.engine.seen import look
from kvrun.runtime.engine.sequence import Sequence as Running
from kvrun.runtime.engine.slots import Slots
from kvrun.runtime.layers.cross import CrossDecoder
from kvrun.runtime.sampling.params import SamplingParams
from tests.runtime.driver import Driver
from tests.runtime.models.compare import prompt, worst
from tests.runtime.vision import eyes
from tests.runtime.vision.eyes import END, TOKEN

# Text before an image, behind one, and behind the end of a text with an image. Two of the images
# are seen by as many tokens as they have features.
LONG = [*prompt(41, 3), TOKEN, *prompt(42, 4), TOKEN, *prompt(43, 3), END, *prompt(44, 3), TOKEN,
        *prompt(45, 7)]  # fmt: skip
SHORT = [TOKEN, TOKEN, *prompt(46, 5)]
TEXT = prompt(47, 11)
SHOWN = ((LONG, [0, 1, 2]), (SHORT, [1, 3]), (TEXT, []))


@dataclass
class SeeingDriver(Driver):
    """A driver whose sequences attend to images, read when their first tokens come."""

    shown: dict[int, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.model, CrossDecoder)
        assert self.model.vision is not None
        self.features = Features(self.model.vision, 1 << 20)
        slots = Slots(1, 1, torch.device("cpu"))
        self.reader = Reader(self.model, self.backend, slots, None, self.block_size, self.features)

    def begin(self, number: int, ids: list[int], seeds: list[int]) -> None:
        assert self.model.vision is not None
        images = [eyes.image("idefics", seed) for seed in seeds]
        asked = Request(id=str(number), prompt_ids=ids, params=SamplingParams(), images=images)
        options: Any = {"seed": 0, "max_length": 99, "root": b""}
        options["seen"] = look(asked, self.model.vision.places)
        sequence = self.shown[number] = Running(asked, 0, **options)
        for source in sequence.sources:
            blocks = [self.free.pop() for _ in range(-(-source.rows // self.block_size))]
            sequence.source_blocks.append(blocks)
            sequence.source_hits.append(False)

    def prepared(self, work: Sequence[tuple[int, Sequence[int]]], shift: int = 0) -> Batch:
        rows = [Row(self.shown[n], self.lengths.get(n, 0), len(ids), False) for n, ids in work]
        self.reader.read(rows)
        batch = self.batch(work, shift)
        self.reader.show(rows, batch)
        return batch


@torch.inference_mode()
def reference(oracle: Any, ids: list[int], seeds: list[int]) -> torch.Tensor:
    shown = eyes.inputs("idefics", seeds, ids)
    logits: torch.Tensor = oracle(torch.tensor([ids]), use_cache=False, **shown).logits[0].float()
    return logits


def stepwise(driver: SeeingDriver, oracle: Any) -> float:
    """Largest difference over prompts in one step up to their last tokens, then token by token."""
    rows: list[list[torch.Tensor]] = [[] for _ in SHOWN]
    for number, (ids, seeds) in enumerate(SHOWN):
        driver.begin(number, ids, seeds)
    work = [(n, ids[:-4]) for n, (ids, _) in enumerate(SHOWN)]
    for back in range(-4, 1):
        for (number, _), logits in zip(work, driver.step(work), strict=True):
            rows[number].append(logits)
        work = [(n, [ids[back]]) for n, (ids, _) in enumerate(SHOWN)]
    pairs = zip(rows, SHOWN, strict=True)
    return max(worst(found, reference(oracle, *shown)) for found, shown in pairs)
