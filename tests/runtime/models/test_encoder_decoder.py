"""Models with an encoder give the logits that transformers gives; mistakes must show."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun.errors import Unsupported
from kvrun.runtime import device
from kvrun.runtime.attention.triton import Attention as Triton
from kvrun.runtime.calibrate.layers import Layers
from kvrun.runtime.layers import attention, cross, encoder, mlp, norm, position
from kvrun.runtime.layers.position import RelativeBias
from kvrun.runtime.models import t5
from tests.runtime.models import seq2seq, zoo
from tests.runtime.models.compare import TOLERANCE, greedy, prompt
from tests.runtime.models.seq2seq import EncodedDriver, stepwise
from tests.runtime.models.spoil import replaced, swap_names, without
from tests.runtime.models.test_ranks import Sum, Threads

Made = Callable[[str, str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    known: dict[tuple[str, str], tuple[Path, Any]] = {}

    def get(family: str, variant: str) -> tuple[Path, Any]:
        if (family, variant) not in known:
            folder = tmp_path_factory.mktemp(family)
            known[family, variant] = folder, seq2seq.make(folder, family, variant)
        return known[family, variant]

    return get


@pytest.fixture
def mutant(made: Made, tmp_path: Path) -> Made:
    def copy(family: str, variant: str) -> tuple[Path, Any]:
        folder, oracle = made(family, variant)
        return Path(shutil.copytree(folder, tmp_path / "mutant")), oracle

    return copy


of_every_family = pytest.mark.parametrize(("family", "variant"), list(seq2seq.VARIANTS))


@of_every_family
def test_prefill_and_steps(made: Made, family: str, variant: str) -> None:
    folder, oracle = made(family, variant)
    assert stepwise(EncodedDriver(folder), oracle) <= TOLERANCE


@of_every_family
def test_the_order_of_kernels_gives_the_same_logits(
    made: Made, family: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention, mlp, norm):
        monkeypatch.setattr(module, "fused", device.kernel)
    folder, oracle = made(family, variant)
    assert stepwise(EncodedDriver(folder), oracle) <= TOLERANCE


@of_every_family
def test_64_greedy_tokens(made: Made, family: str, variant: str) -> None:
    folder, oracle = made(family, variant)
    driver = EncodedDriver(folder)
    sources = [prompt(10 + i, 12 + i) for i in range(3)]
    found: list[list[int]] = [[] for _ in sources]
    for number, ids in enumerate(sources):
        driver.begin(number, ids)
    work = [(number, [0]) for number in range(len(sources))]
    for _ in range(64):
        work = [(i, [int(rows[-1].argmax())]) for i, rows in enumerate(driver.step(work))]
        for i, ids in work:
            found[i] += ids
    for source, answer in zip(sources, found, strict=True):
        assert [answer] == greedy(oracle, [[0]], [answer], input_ids=torch.tensor([source]))


@of_every_family
def test_two_ranks_are_one_model(made: Made, family: str, variant: str) -> None:
    folder, _ = made(family, variant)
    total = Sum()

    def logits(**options: Any) -> torch.Tensor:
        driver = EncodedDriver(folder, **options)
        driver.begin(0, prompt(1, 30))
        return torch.cat([*driver.step([(0, [0, 5, 6])]), *driver.step([(0, [7])])])

    whole = logits()
    parts = total.both(lambda rank: logits(group=Threads(rank, sum=total)))
    for part in parts:
        if isinstance(part, Exception):
            raise part
        assert (part - whole).abs().max() <= 1e-4


@of_every_family
def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    made: Made, family: str, variant: str
) -> None:
    folder, oracle = made(family, variant)
    source, target = prompt(6, 30), [0, *prompt(7, 30)]
    rounded = type(oracle).from_pretrained(folder, dtype=torch.bfloat16)
    driver = EncodedDriver(folder, dtype=torch.bfloat16)
    driver.begin(0, source)
    exact = seq2seq.reference(oracle, source, target)
    theirs = seq2seq.reference(rounded, source, target) - exact
    ours = driver.step([(0, target)])[0] - exact
    assert ours.abs().mean(-1).median() <= 1.25 * theirs.abs().mean(-1).median()


def test_a_long_prompt_is_read_in_pieces_of_queries(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, oracle = made("t5", "flan")
    monkeypatch.setattr(encoder, "_SCORES", 5 * 4 * seq2seq.LONG)
    assert stepwise(EncodedDriver(folder), oracle) <= TOLERANCE


def test_copies_and_leftovers_of_old_files_are_passed_over(mutant: Made) -> None:
    folder, oracle = mutant("t5", "v1.0")
    old = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    names = [f"{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    more = {old: torch.ones(8, 4), **{name: torch.ones(128, 64) for name in names}}
    zoo.edit_tensors(folder, lambda tensors: tensors | more)
    assert stepwise(EncodedDriver(folder), oracle) <= TOLERANCE


def test_float16_and_writing_into_a_folder_are_refused(made: Made) -> None:
    folder, _ = made("t5", "v1.0")
    with pytest.raises(Unsupported, match="overflow float16"):
        EncodedDriver(folder, dtype=torch.float16)
    with pytest.raises(Unsupported, match="a model with cross-attention"):
        Layers(folder, torch.device("cpu"), torch.float32)


def test_kernels_without_the_bias_refuse_it(made: Made) -> None:
    spec = EncodedDriver(made("t5", "v1.0")[0]).model.specs[0]
    cuda = torch.device("cuda")
    assert "bias" in (Triton.reject(replace(spec, head_dim=64), cuda) or "")
    assert Triton.reject(replace(spec, head_dim=64, relative=None), cuda) is None


def causal(real: Any) -> Any:
    return lambda *args, both: real(*args, both=False)


def scaled(real: Any) -> Any:
    return lambda *args, scale, **options: real(*args, scale=8**-0.5, **options)


def seeing_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    def square(self: RelativeBias, first: int, last: int, keys: int) -> torch.Tensor:
        bias = real(self, first, last, keys)
        future = torch.ones(bias.shape[1:], dtype=torch.bool).triu(1)
        return bias.masked_fill(future, float("-inf"))

    real = RelativeBias._square
    monkeypatch.setattr(RelativeBias, "_square", square)


def biased_cross(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cross.AttentionSpec

    def spec(*args: Any, **options: Any) -> Any:
        return real(*args, **options, relative=torch.linspace(0, 3, 20).repeat(4, 1))

    monkeypatch.setattr(cross, "AttentionSpec", spec)


def no_last_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = t5.rms

    def read_and_drop(w: Any, name: str) -> Any:
        found = real(w, name)
        return (lambda x: x) if name == "encoder.final_layer_norm" else found

    monkeypatch.setattr(t5, "rms", read_and_drop)


def first_bias(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    firsts = {k: tensors[k.replace("block.1", "block.0")] for k in tensors if "relative" in k}
    return tensors | {k: t.clone() for k, t in firsts.items()}


CONFIG_MUTATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "buckets reach farther": ("t5", "v1.0", {"relative_attention_max_distance": 40}),
    "eps × 10,000": ("t5", "v1.0", {"layer_norm_epsilon": 1e-2}),
    "a tied head that does not shrink": ("t5", "v1.0", {"scale_decoder_outputs": False}),
    "an own head that shrinks": ("t5", "flan", {"scale_decoder_outputs": True}),
    "silu for gelu": ("t5", "flan", {"feed_forward_proj": "gated-silu"}),
    "relu for gelu": ("t5", "flan", {"feed_forward_proj": "gated-relu"}),
    "silu for relu": ("t5", "v1.0", {"feed_forward_proj": "silu"}),
    "umt5's head does not shrink": ("umt5", "plain", {"scale_decoder_outputs": False}),
}
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
TENSOR_MUTATIONS: dict[str, tuple[str, str, Change]] = {
    "keys and values of cross-attention": (
        "t5", "v1.0", swap_names("EncDecAttention.k.", "EncDecAttention.v.")
    ),
    "gate and up": ("t5", "flan", swap_names("wi_0", "wi_1")),
    "norms of cross-attention and MLP": (
        "t5", "flan", swap_names("decoder.block.0.layer.1.layer_norm",
                                 "decoder.block.0.layer.2.layer_norm")
    ),
    "a tied head for an own one": (
        "mt5", "plain", lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}
    ),
    "the first layer's bias in every layer": (
        "umt5", "plain", first_bias
    ),
}  # fmt: skip
CODE_MUTATIONS: dict[str, tuple[str, str, Any]] = {
    "encoder buckets of a decoder": ("t5", "v1.0", replaced(position, "RelativeBias", causal)),
    "no bias in the decoder": ("t5", "v1.0", replaced(t5, "Attention", without("relative"))),
    "bias in cross-attention": ("t5", "v1.0", biased_cross),
    "encoder scaled": (
        "t5", "v1.0", replaced(t5, "EncoderAttention", scaled)
    ),
    "decoder scaled": ("t5", "v1.0", replaced(t5, "Attention", scaled)),
    "cross-attention scaled": (
        "t5", "v1.0", replaced(t5, "CrossAttention", scaled)
    ),
    "encoder sees the past only": ("t5", "v1.0", seeing_the_past),
    "no norm behind the encoder": ("t5", "v1.0", no_last_norm),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_MUTATIONS)
def test_config_mutation_shows(name: str, mutant: Made) -> None:
    family, variant, changes = CONFIG_MUTATIONS[name]
    folder, oracle = mutant(family, variant)
    zoo.edit_config(folder, **changes)
    assert stepwise(EncodedDriver(folder), oracle) > TOLERANCE


@pytest.mark.parametrize("name", TENSOR_MUTATIONS)
def test_tensor_mutation_shows(name: str, mutant: Made) -> None:
    family, variant, change = TENSOR_MUTATIONS[name]
    folder, oracle = mutant(family, variant)
    zoo.edit_tensors(folder, change)
    if name.startswith("a tied head"):
        zoo.edit_config(folder, tie_word_embeddings=True)
    assert stepwise(EncodedDriver(folder), oracle) > TOLERANCE


@pytest.mark.parametrize("name", CODE_MUTATIONS)
def test_code_mutation_shows(name: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    family, variant, spoil = CODE_MUTATIONS[name]
    folder, oracle = made(family, variant)
    spoil(monkeypatch)
    assert stepwise(EncodedDriver(folder), oracle) > TOLERANCE
