"""Idefics, whose text attends to images beside it, gives the logits that transformers gives;
mistakes must show."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun import LLM, SamplingParams
from kvrun.errors import Unsupported
from kvrun.runtime import device
from kvrun.runtime.attention import triton
from kvrun.runtime.calibrate.layers import Layers
from kvrun.runtime.engine.seen import Attended
from kvrun.runtime.layers import attention, cross, mlp, norm
from kvrun.runtime.models import idefics
from tests.runtime.models import zoo
from tests.runtime.models.attending import SHOWN, SeeingDriver, reference, stepwise
from tests.runtime.models.compare import TOLERANCE, worst
from tests.runtime.models.spoil import Tensors, replaced, swap_names, without, zeroed
from tests.runtime.models.test_ranks import Sum, Threads
from tests.runtime.vision import eyes
from tests.runtime.vision.test_engine import wanted

Made = Callable[[str], tuple[Path, Any]]
VARIANTS = {"perceiver": "idefics", "patches": "idefics-patches"}
of_every_variant = pytest.mark.parametrize(
    ("family", "variant"), [("idefics", v) for v in VARIANTS]
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    done: dict[str, tuple[Path, Any]] = {}

    def get(variant: str) -> tuple[Path, Any]:
        if variant not in done:
            folder = tmp_path_factory.mktemp(variant)
            done[variant] = folder, eyes.make(folder, VARIANTS[variant])
        return done[variant]

    return get


@pytest.fixture
def mutant(made: Made, tmp_path: Path) -> Made:
    def copy(variant: str) -> tuple[Path, Any]:
        folder, oracle = made(variant)
        return Path(shutil.copytree(folder, tmp_path / "mutant")), oracle

    return copy


@of_every_variant
def test_prefill_and_steps(made: Made, family: str, variant: str) -> None:
    folder, oracle = made(variant)
    assert stepwise(SeeingDriver(folder), oracle) <= TOLERANCE


@of_every_variant
def test_the_order_of_kernels_gives_the_same_logits(
    made: Made, family: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention, mlp, norm):
        monkeypatch.setattr(module, "fused", device.kernel)
    folder, oracle = made(variant)
    assert stepwise(SeeingDriver(folder), oracle) <= TOLERANCE


@of_every_variant
def test_the_backend_of_a_gpu_gives_the_same_logits(made: Made, family: str, variant: str) -> None:
    folder, oracle = made(variant)
    driver = SeeingDriver(folder, block_size=16)
    backend = triton.Attention(driver.backend.cache, torch.float32)
    driver.backend = driver.reader._backend = backend
    assert stepwise(driver, oracle) <= TOLERANCE


@of_every_variant
def test_two_ranks_are_one_model(made: Made, family: str, variant: str) -> None:
    folder, oracle = made(variant)
    total = Sum()
    for part in total.both(
        lambda rank: stepwise(SeeingDriver(folder, group=Threads(rank, sum=total)), oracle)
    ):
        if isinstance(part, Exception):
            raise part
        assert part <= 1e-4


@of_every_variant
def test_chunks_beside_decodes_and_a_shared_prefix(made: Made, family: str, variant: str) -> None:
    folder, oracle = made(variant)
    driver = SeeingDriver(folder)
    (a, seen), (b, others), _ = SHOWN
    rows: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    driver.begin(0, a, seen)
    driver.begin(1, b, others)
    # Chunks end within what an image is seen by.
    for work in (
        [(0, a[:6]), (1, b[:-2])],
        [(0, a[6:12]), (1, b[-2:-1])],
        [(0, a[12:]), (1, b[-1:])],
    ):
        for (number, _), logits in zip(work, driver.step(work), strict=True):
            rows[number].append(logits)
    driver.begin(2, a, seen)
    driver.share(0, 2, 12)
    driver.shown[2].begun = 12
    rows[2] = [reference(oracle, a, seen)[:12], *driver.step([(2, a[12:])])]
    for number, shown in ((0, SHOWN[0]), (1, SHOWN[1]), (2, SHOWN[0])):
        assert worst(rows[number], reference(oracle, *shown)) <= TOLERANCE


@of_every_variant
def test_64_greedy_tokens(made: Made, family: str, variant: str) -> None:
    folder, oracle = made(variant)
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    with LLM(str(folder), block_size=4) as llm:
        images = [[eyes.image("idefics", seed) for seed in seeds] for _, seeds in SHOWN]
        found = llm.generate([ids for ids, _ in SHOWN], params, images=images)
    for (ids, seeds), out in zip(SHOWN, found, strict=True):
        assert list(out.token_ids) == wanted(oracle, "idefics", ids, seeds, 64)


@of_every_variant
def test_bfloat16_is_as_near_to_float32_as_transformers_is(
    made: Made, family: str, variant: str
) -> None:
    folder, oracle = made(variant)
    rounded = type(oracle).from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    ids, seeds = SHOWN[0]
    exact = reference(oracle, ids, seeds)
    driver = SeeingDriver(folder, dtype=torch.bfloat16)
    driver.begin(0, ids, seeds)
    ours = driver.step([(0, ids)])[0] - exact
    theirs = reference(rounded, ids, seeds) - exact
    assert ours.abs().mean(-1).median() <= 1.25 * theirs.abs().mean(-1).median()


def test_writing_into_a_folder_is_refused(made: Made) -> None:
    with pytest.raises(Unsupported, match="a model with cross-attention"):
        Layers(made("patches")[0], torch.device("cpu"), torch.float32)


def no_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    def ungated(*args: Any) -> Any:
        block = cross.GatedCrossBlock(*args)
        block._cross_gate, block._mlp_gate = args[4]
        return block

    monkeypatch.setattr(idefics, "GatedCrossBlock", ungated)


def seeing(image: Callable[[Attended, int], int]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(Attended, "_at", image)


def causal(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cross.AttentionSpec
    monkeypatch.setattr(cross, "AttentionSpec", lambda *args, causal: real(*args))


def unrotated_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images behind the layer instead of before it."""

    def call(self: Any, x: torch.Tensor, batch: Any) -> torch.Tensor:
        inner, self._block = self._block, lambda x, batch: x
        try:
            return real(self, inner(x, batch), batch)
        finally:
            self._block = inner

    real = cross.GatedCrossBlock.__call__
    monkeypatch.setattr(cross.GatedCrossBlock, "__call__", call)


CONFIG_MUTATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "eps × 10": ("idefics", "perceiver", {"rms_norm_eps": 1e-3}),
    "no text ends": ("idefics", "perceiver", {"eos_token_id": 3}),
    "rope theta +1 %": ("idefics", "perceiver", {"rope_parameters": {"rope_theta": 10100.0}}),
    "gelu for silu": ("idefics", "perceiver", {"hidden_act": "gelu"}),
}
TENSOR_MUTATIONS: dict[str, tuple[str, str, Callable[[Tensors], Tensors]]] = {
    "gates swapped": ("idefics", "perceiver", swap_names("alpha_cross_attn", "alpha_dense")),
    "gates shut": ("idefics", "perceiver", zeroed("alpha_cross_attn")),
    "keys and values of images": (
        "idefics",
        "perceiver",
        swap_names("cross_attn.k_proj", "cross_attn.v_proj"),
    ),
    "norms of queries": ("idefics", "perceiver", zeroed("cross_attn.q_layer_norm.weight")),
    "norms of keys": ("idefics", "perceiver", zeroed("cross_attn.k_layer_norm.weight")),
    "norms of attention and MLP": (
        "idefics",
        "perceiver",
        swap_names("attn_layers.0.input_layernorm", "attn_layers.0.post_attention_layernorm"),
    ),
    "attention of another layer": (
        "idefics",
        "perceiver",
        swap_names("attn_layers.0.", "attn_layers.1."),
    ),
    "rows of added words": ("idefics", "perceiver", zeroed("additional_embedding.weight")),
    "logits of added words": ("idefics", "perceiver", zeroed("additional_fc.weight")),
    "perceiver's norms": (
        "idefics",
        "perceiver",
        swap_names("latents_layer_norm", "context_layer_norm"),
    ),
    "perceiver's head norms": (
        "idefics",
        "perceiver",
        swap_names("0.0.q_layer_norm", "0.0.k_layer_norm"),
    ),
    "perceiver's layers": ("idefics", "perceiver", swap_names("blocks.0.", "blocks.1.")),
    "the tower's class": ("idefics", "perceiver", zeroed("class_embedding")),
}
CODE_MUTATIONS: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch], None]]] = {
    "gates without tanh": ("idefics", "perceiver", no_tanh),
    "head norms off": (
        "idefics",
        "perceiver",
        replaced(idefics, "CrossAttention", without("norms")),
    ),
    "images behind the layer": ("idefics", "perceiver", unrotated_order),
    "rows see features one by one": ("idefics", "perceiver", causal),
    "all see the first image": ("idefics", "perceiver", seeing(lambda self, position: 0)),
    "all see the last image": (
        "idefics",
        "perceiver",
        seeing(lambda self, position: len(self.sources) - 1),
    ),
    "text before images sees one": (
        "idefics",
        "perceiver",
        seeing(lambda self, p: max(0, self._seen[p])),
    ),
}


@pytest.mark.parametrize("name", CONFIG_MUTATIONS)
def test_config_mutation_shows(name: str, mutant: Made) -> None:
    _, variant, changes = CONFIG_MUTATIONS[name]
    folder, oracle = mutant(variant)
    zoo.edit_config(folder, **changes)
    assert stepwise(SeeingDriver(folder), oracle) > TOLERANCE


@pytest.mark.parametrize("name", TENSOR_MUTATIONS)
def test_tensor_mutation_shows(name: str, mutant: Made) -> None:
    _, variant, change = TENSOR_MUTATIONS[name]
    folder, oracle = mutant(variant)
    zoo.edit_tensors(folder, change)
    assert stepwise(SeeingDriver(folder), oracle) > TOLERANCE


@pytest.mark.parametrize("name", CODE_MUTATIONS)
def test_code_mutation_shows(name: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    _, variant, spoil = CODE_MUTATIONS[name]
    folder, oracle = made(variant)
    spoil(monkeypatch)
    assert stepwise(SeeingDriver(folder), oracle) > TOLERANCE
