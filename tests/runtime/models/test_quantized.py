"""Quantized models of every family say what the values of their codes say, put in their place.

Every family meets one way of quantizing, in turns; every way meets each kind of layout. The page
docs/models.md comes from a run of all with all.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrun.errors import Unsupported
from kvrun.runtime.config import QUANTIZE
from tests.runtime.models import coded, every
from tests.runtime.models.compare import TOLERANCE

Models = Callable[[str, str], tuple[Path, Any]]
WAYS = [*QUANTIZE, *itertools.chain.from_iterable(coded.FORMS.values())]
LAYOUTS = [
    ("llama", "biases"),  # a tensor for each of q, k, v, gate and up
    ("phi3", "4k"),  # all rows of q, k, v in one, gate and up in one
    ("falcon", "40b"),  # queries, a key and a value for each key and value head
    ("mixtral", "plain"),  # experts with tensors of their own
    ("granitemoehybrid", "experts"),  # experts in one tensor, and states
    ("deepseek_v3", "plain"),  # latents
    ("mamba", "plain"),
    ("t5", "flan"),  # an encoder
]
TURNED = ("gptq", "bitsandbytes")  # of these GPT-2 has files


def cases() -> list[tuple[str, str, str]]:
    turns = [(*model, way) for model, way in zip(every.variants(), itertools.cycle(WAYS))]
    whole = [(*model, way) for model in LAYOUTS for way in WAYS]
    # Experts in one tensor, stored in other ways; matrices stored [in, out].
    stacks = [(*m, way) for m in (("gpt_oss", "plain"), ("dbrx", "plain")) for way in QUANTIZE]
    known = [way for kind in TURNED for way in coded.FORMS[kind]]
    turned = [("gpt2", "plain", way) for way in (*QUANTIZE, *known)]
    found = dict.fromkeys(turns + whole + stacks + turned)
    return [case for case in found if case[0] != "gpt2" or case[2] in (*QUANTIZE, *known)]


@pytest.mark.parametrize(("family", "variant", "way"), cases())
def test_codes_say_what_their_values_say(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    variant: str,
    way: str,
) -> None:
    folder = every.folder(models, tmp_path, family, variant)
    coded.exactly(monkeypatch)
    assert coded.difference(folder, tmp_path, family, way) <= TOLERANCE


STORED = WAYS[len(QUANTIZE) :]


@pytest.mark.parametrize(
    ("family", "variant", "way"),
    [
        (*LAYOUTS[(n * 3 + turn) % len(LAYOUTS)], way)
        for turn in (0, 1)
        for n, way in enumerate(STORED)
    ],
)
def test_two_ranks_cut_codes_where_one_would(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    variant: str,
    way: str,
) -> None:
    folder = every.folder(models, tmp_path, family, variant)
    coded.exactly(monkeypatch)
    assert coded.difference(folder, tmp_path, family, way, ranks=2) <= TOLERANCE


def test_every_way_is_met_by_families_in_turns() -> None:
    assert {way for *_, way in cases()} == set(WAYS)
    assert {family for family, *_ in cases()} == {family for family, _ in every.variants()}


@pytest.mark.parametrize("kind", [kind for kind in coded.FORMS if kind not in TURNED])
def test_formats_that_know_no_matrices_in_out_are_refused(
    models: Models, tmp_path: Path, kind: str
) -> None:
    with pytest.raises(Unsupported, match=r"stores its matrices as \[in, out\]"):
        coded.difference(models("gpt2", "plain")[0], tmp_path, "gpt2", coded.FORMS[kind][0])


def test_experts_in_one_tensor_of_8_bits_are_refused(models: Models, tmp_path: Path) -> None:
    folder, _ = models("llama4_text", "scout")
    said, files, _ = coded.stored(folder, "llama4_text", "fbgemm")
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    files[name] = files[name].to(coded.torch.float8_e4m3fn)
    with pytest.raises(Unsupported, match=f"the experts {name} are stored as 'fbgemm_fp8'"):
        every.driver(coded.copied(folder, tmp_path / "m", files, said), "llama4_text")
