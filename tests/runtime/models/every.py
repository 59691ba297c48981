"""Every family of the folder alike: a small checkpoint, a driver, what it says of two prompts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.runtime.lora.adapters import Adapted, ready
from tests.runtime.models import seq2seq, test_baichuan, test_idefics, zoo
from tests.runtime.models.attending import SHOWN, SeeingDriver
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
    yield from (("idefics", variant) for variant in test_idefics.VARIANTS)


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
        eyes.make(folder, test_idefics.VARIANTS[variant])
    else:
        (seq2seq if family in ENCODED else zoo).make(folder, family, variant)


class _Reads:
    """Has prompts or images read by the sequence's adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reader._bank = self.bank  # type: ignore[attr-defined]


class AdaptedEncoded(_Reads, EncodedDriver, Adapted):
    """A driver with a bank whose prompts are read by an encoder."""


class AdaptedSeeing(_Reads, SeeingDriver, Adapted):
    """A driver with a bank whose sequences attend to images."""


def driver(folder: Path, family: str, **options: Any) -> Adapted:
    if family == "idefics":
        return AdaptedSeeing(folder, **options)
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
    starts = ANSWERS if isinstance(runs, EncodedDriver) else PROMPTS
    if isinstance(runs, EncodedDriver):
        for number, ids in enumerate(PROMPTS):
            runs.begin(number, ids)
        _give(runs, runs.sources[0], adapter)
    if isinstance(runs, SeeingDriver):
        starts = [ids for ids, _ in SHOWN[:2]]
        for number, (ids, seeds) in enumerate(SHOWN[:2]):
            runs.begin(number, ids, seeds)
        _give(runs, runs.shown[0], adapter)
    rows = []
    for parts in (starts, [[7], [9]]):
        work = [(n, ids, names[n]) for n, ids in enumerate(parts)]
        rows += runs.adapted(work, form)
    return torch.cat(rows)


def _give(runs: Adapted, sequence: Any, adapter: str | None) -> None:
    found = runs.bank.find(adapter)
    sequence.adapter = ready(runs.bank, found) if found else None


def rows_of_the_first(family: str) -> torch.Tensor:
    """bool [rows]: which rows of `logits` are those of the first prompt."""
    shown = [ids for ids, _ in SHOWN[:2]] if family == "idefics" else PROMPTS
    first, other = map(len, ANSWERS if family in ENCODED else shown)
    return torch.tensor([True] * first + [False] * other + [True, False])
