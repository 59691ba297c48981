"""What models_matrix.py runs beside the tests: every family with every way of quantizing, with
every attention backend, and what is refused, in the words of the refusal."""

import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvrun.errors import KvrunError
from kvrun.folder import load, names
from kvrun.runtime import attention, device
from kvrun.runtime.attention import _compiled, triton
from kvrun.runtime.calibrate.job import Recipe, quantize
from kvrun.runtime.config import QUANTIZE
from kvrun.runtime.quant import _round
from tests.runtime.attention import fake_flashinfer
from tests.runtime.models import coded, every
from tests.runtime.models.compare import TOLERANCE
from tests.runtime.quant import test_experts

WRITTEN = "`kvrun quantize`"
MXFP4 = "mxfp4"
BACKENDS = names(attention.__name__)
CUDA = torch.device("cuda")
# Sizes that every backend's kernels know: which sizes these are is said beside the table.
_HEAD, _LATENT, _KEY = 128, 512, 576


class Results:
    """(family, column) -> what came of each variant: True, False, or why it was refused."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[bool | str]] = defaultdict(list)
        self.notes: dict[str, int] = {}  # of refusals, in the order of the page

    def add(self, family: str, column: str, run: Callable[[], float]) -> None:
        """Note whether `run` stays within the tolerance; what breaks is printed, and is wrong."""
        outcome: bool | str
        try:
            outcome = run() <= TOLERANCE
        except KvrunError as error:
            outcome = plainly(error)
        except Exception as error:
            print(f"{family}, {column}: {error!r}")
            outcome = False
        if outcome is False:
            print(f"{family}, {column}: wrong")
        self.found[family, column].append(outcome)

    def cell(self, family: str, column: str) -> str:
        found = self.found.get((family, column), [])
        if not found:
            return "-"
        if False in found:
            return "**no**"
        reasons = dict.fromkeys(reason for reason in found if isinstance(reason, str))
        marks = "".join(f"[^{self.note(reason)}]" for reason in reasons)
        word = "yes" if not reasons else "in part" if True in found else "no"
        return f"{word}{marks}"

    def note(self, reason: str) -> int:
        return self.notes.setdefault(reason, len(self.notes) + 1)


def plainly(error: KvrunError) -> str:
    """Its words without paths, and with one layer's name for all."""
    words = re.sub(r" in /\S+", "", error.in_one_line)
    words = re.sub(r"the experts \S+", "the experts", words)
    words = re.sub(r"^'[\w-]+' of a family", "this format of a family", words)
    return re.sub(r"[^\s(]+ is not stored as .*", "they are stored as [in, out])", words)


@contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kvrun-matrix-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run_all(results: Results) -> None:
    for family, variant in every.variants():
        print(f"{family} {variant}", flush=True)
        with scratch() as place, pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            every.make(place / "model", family, variant)
            _attend(results, place, family)
            coded.exactly(patch)
            _quantized(results, place, family)
            _written(results, place, family)


def _quantized(results: Results, place: Path, family: str) -> None:
    """Rounded as they are read, by one rank; stored, by one and by two."""
    ways = {heading(method): [method] for method in QUANTIZE} | coded.FORMS
    for column, forms in ways.items():
        for form in forms:
            for ranks in (1,) if form in QUANTIZE else (1, 2):
                with scratch() as own:
                    results.add(
                        family,
                        column,
                        lambda form=form, ranks=ranks, own=own: coded.difference(
                            place / "model", own, family, form, ranks
                        ),
                    )
    if family == "gpt_oss":
        with scratch() as own:
            results.add(family, MXFP4, lambda: _mxfp4(own))


def heading(method: str) -> str:
    return f"`--quantize {method}`"


def _mxfp4(place: Path) -> float:
    found = every.logits(every.driver(test_experts.gpt_oss(place), "gpt_oss"))
    wanted = every.logits(every.driver(place / "plain", "gpt_oss"))
    return float((found - wanted).abs().max())


def _written(results: Results, place: Path, family: str) -> None:
    """A folder in int8 holds what rounding to int8 makes, but for the head, which stays plain."""

    def difference() -> float:
        quantize(place / "model", place / "written", Recipe("m", "int8"), [], device="cpu")
        found = every.logits(every.driver(place / "written", family))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_round, "head", lambda w, plain, bias: None)
            wanted = every.logits(every.driver(place / "model", family, quantize="int8"))
        return float((found - wanted).abs().max())

    results.add(family, WRITTEN, difference)


def _attend(results: Results, place: Path, family: str) -> None:
    """Of each backend its own refusal, or the logits of its kernels, interpreted, against those of
    torch; FlashInfer is a stand-in."""
    runs = every.driver(place / "model", family)
    if not runs.model.specs:
        return
    wanted = every.logits(runs)
    for name in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            backend = _loaded(name, patch, place)

            def difference(backend: type[attention.Backend] = backend) -> float:
                for spec in runs.model.specs:
                    if reason := backend.reject(_usual(spec), CUDA):
                        raise KvrunError(reason)
                made = every.driver(place / "model", family, backend_type=backend)
                return float((every.logits(made) - wanted).abs().max())

            results.add(family, name, difference)
    fake_flashinfer.uninstall()


def _usual(spec: attention.AttentionSpec) -> attention.AttentionSpec:
    if spec.latent is not None:
        return replace(spec, head_dim=_KEY, latent=_LATENT)
    return replace(spec, head_dim=_HEAD)


def _loaded(name: str, patch: pytest.MonkeyPatch, place: Path) -> type[attention.Backend]:
    """The backend's class, made to run here."""
    if name == "triton":
        patch.setattr(triton, "kernel", lambda name, on: load(device.TRITON, name))
    if name == "flashinfer":
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_capability", lambda on=None: (9, 0))
        patch.setattr(_compiled, "version", lambda name: "0.6.13")
        patch.setenv("FLASHINFER_WORKSPACE_BASE", str(place))
        fake_flashinfer.install(patch, place)
        module = load(attention.__name__, name)
        patch.setattr(module, "LONG", 6)
        patch.setattr(module, "FAR", 0)
        patch.setattr(module, "_pinned", lambda values: torch.tensor(values, dtype=torch.int32))
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        patch.setattr(torch.cuda, "Event", lambda: event)
    found: type[attention.Backend] = load(attention.__name__, name).Attention
    return found
