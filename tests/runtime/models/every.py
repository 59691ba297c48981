"""Every family of the folder alike: a small checkpoint, a driver, what it says of two prompts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvrun.runtime.engine.reader import Reader
from kvrun.runtime.engine.slots import Slots
from tests.runtime.lora.adapters import Adapted, ready
from tests.runtime.models import seq2seq, test_baichuan, zoo
from tests.runtime.models.compare import prompt
from tests.runtime.models.seq2seq import EncodedDriver
from tests.runtime.models.test_ranks import Sum, Threads
from tests.runtime.vision import eyes

ENCODED = sorted({family for family, _ in seq2seq.VARIANTS})
PROMPTS = [prompt(1, 11), prompt(2, 5)]
ANSWERS = [[0, 9, 8], [0]]  # what is known of them where an encoder reads the prompts


def variants() -> Iterator[tuple[str, str]]:
    yield from zoo.variants()
    yield from seq2seq.VARIANTS
    yield "baichuan", "13b-1"
    yield "idefics", "perceiver"


def folder(models: Any, place: Path, family: str, variant: str) -> Path:
    """A small checkpoint, one that has been made already if there is one."""
    if family in zoo.VARIANTS:
        return models(family, variant)[0]  # type: ignore[no-any-return]
    make(place / "model", family, variant)
    return place / "model"


def make(folder: Path, family: str, variant: str) -> None:
    """A random checkpoint in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if family == "baichuan":
        test_baichuan.make(folder)
    elif family == "idefics":
        eyes.make(folder, family)
    else:
        (seq2seq if family in ENCODED else zoo).make(folder, family, variant)


class AdaptedEncoded(EncodedDriver, Adapted):
    """A driver with a bank whose prompts are read by an encoder, with the sequence's adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        slots = Slots(1, 1, torch.device("cpu"))
        self.reader = Reader(self.model, self.backend, slots, self.bank, self.block_size)  # type: ignore[arg-type]


def driver(folder: Path, family: str, **options: Any) -> Adapted:
    return (AdaptedEncoded if family in ENCODED else Adapted)(folder, **options)


def on_ranks(folder: Path, family: str, ranks: int) -> list[torch.Tensor]:
    """What one rank says, or each of two."""
    if ranks == 1:
        return [logits(driver(folder, family))]
    total = Sum()
    found = total.both(lambda rank: logits(driver(folder, family, group=Threads(rank, sum=total))))
    for part in found:
        if isinstance(part, Exception):
            raise part
    return found


def logits(runs: Adapted, adapter: str | None = None, form: str = "joined") -> torch.Tensor:
    """Of both prompts and of a step behind each; the first one with the adapter."""
    names = [adapter, None]
    if isinstance(runs, EncodedDriver):
        for number, (ids, name) in enumerate(zip(PROMPTS, names, strict=True)):
            runs.begin(number, ids)
            found = runs.bank.find(name)
            runs.sources[number].adapter = ready(runs.bank, found) if found else None
    rows = []
    for parts in (ANSWERS if isinstance(runs, EncodedDriver) else PROMPTS, [[7], [9]]):
        work = [(n, ids, names[n]) for n, ids in enumerate(parts)]
        rows += runs.adapted(work, form)
    return torch.cat(rows)


def rows_of_the_first(family: str) -> torch.Tensor:
    """bool [rows]: which rows of `logits` are those of the first prompt."""
    first, other = map(len, ANSWERS if family in ENCODED else PROMPTS)
    return torch.tensor([True] * first + [False] * other + [True, False])
