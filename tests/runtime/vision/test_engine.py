"""Images through the whole engine: chunks, text beside them, preemption, prefixes, 64 tokens."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kvrun import LLM, SamplingParams
from kvrun import folder as registry
from kvrun.runtime.cache.tensors import bytes_per_block
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.layers import mlp, norm
from kvrun.runtime.layers.block import Block
from kvrun.runtime.models import build
from kvrun.runtime.parallel import Group
from tests.runtime.driver import Driver
from tests.runtime.models.compare import TOLERANCE, prompt
from tests.runtime.models.test_ranks import Sum, Threads
from tests.runtime.vision import eyes
from tests.runtime.vision.conftest import Made

GREEDY = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True, logprobs=0)
SERVED = ("llava", "llava_next", "idefics", "idefics2", "mistral3")


def ids_with(folder_model: Any, family: str, seeds: list[int], tail: int = 5) -> list[int]:
    """A prompt that shows images, with text around them; places do not always touch."""
    ids = prompt(len(seeds), 4)
    for seed in seeds:
        count = folder_model.places.count(eyes.image(family, seed))
        half = count // 2 if family in ("idefics2", "mistral3") else count
        ids += [eyes.TOKEN] * half + [7] * (half < count) + [eyes.TOKEN] * (count - half) + [9]
    return ids + prompt(sum(seeds) + 3, tail)


@pytest.fixture
def eye(made: Made) -> Callable[[str], Any]:
    return lambda family: Driver(made(family)[0]).model.vision


@torch.inference_mode()
def wanted(oracle: Any, family: str, ids: list[int], seeds: list[int], count: int) -> list[int]:
    shown = eyes.inputs(family, seeds, ids)
    out = oracle.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=count,
        eos_token_id=None,
        do_sample=False,
        **shown,
    )
    return list(out[0, len(ids) :].tolist())


def features(model: Any, shown: dict[str, torch.Tensor]) -> torch.Tensor:
    if hasattr(model, "get_image_features"):
        return torch.cat(list(model.get_image_features(**shown).pooler_output))
    seen = model.vision_model(shown["pixel_values"][0]).last_hidden_state
    return (model.perceiver_resampler(seen) if model.config.use_resampler else seen)[0]


@pytest.mark.parametrize("family", list(eyes.FAMILIES))
def test_features_are_those_of_transformers(made: Made, family: str) -> None:
    folder, oracle = made(family)
    vision = Driver(folder).model.vision
    assert vision is not None
    for seed in range(4):
        image = eyes.image(family, seed)
        with torch.inference_mode():
            found = vision(image)
            expected = features(oracle.model, eyes.inputs(family, [seed]))
        assert len(found) == (vision.places.attended or vision.places.count(image))
        assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("family", SERVED)
def test_the_order_of_kernels_gives_the_same_features(
    made: Made, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU runs; norms and gates by its own kernels, in Triton's interpreter."""
    folder, image = made(family)[0], eyes.image(family, 1)
    plain = Driver(folder).model.vision
    for module in (mlp, norm):
        monkeypatch.setattr(
            module, "fused", lambda name, _: registry.load("kvrun.runtime.kernels.triton", name)
        )
    fused = Driver(folder).model.vision
    assert plain is not None
    assert fused is not None
    with torch.inference_mode():
        expected = plain(image)
        assert (fused(image) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("family", list(eyes.FAMILIES))
def test_rows_are_dense(made: Made, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernels know one distance between rows, and none between values."""
    seen, call = [], Block.__call__

    def watched(self: Block, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x.is_contiguous())
        return call(self, x, *rest)

    vision = Driver(made(family)[0]).model.vision
    assert vision is not None
    monkeypatch.setattr(Block, "__call__", watched)
    with torch.inference_mode():
        vision(eyes.image(family, 1))
    assert seen
    assert all(seen)


@pytest.mark.parametrize("family", SERVED)
def test_two_ranks_see_what_one_sees(made: Made, family: str) -> None:
    folder, image, total = made(family)[0], eyes.image(family, 1), Sum()

    @torch.inference_mode()
    def look(group: Group) -> torch.Tensor:
        model = build(Checkpoint(folder, group=group))
        assert model.vision is not None
        return model.vision(image)

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(look, (Threads(0, sum=total), Threads(1, sum=total))))
    whole = look(Group())
    for found in both:
        assert (found - whole).abs().max() <= TOLERANCE * whole.abs().max()


@pytest.mark.parametrize("family", SERVED)
def test_in_16_bits_and_without_weights(made: Made, family: str) -> None:
    image = eyes.image(family, 1)
    for options in ({"dtype": "bfloat16"}, {"load_format": "dummy"}):
        with LLM(str(made(family)[0]), **options) as llm:  # type: ignore[arg-type]
            ids = [1, *[eyes.TOKEN] * llm._engine._limits.places.count(image), 2]  # type: ignore
            few = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
            out = llm.generate([[3, 4], ids], few, images=[None, image])
        assert [one.finish_reason for one in out] == ["length", "length"]


@pytest.mark.parametrize("family", SERVED)
def test_logits_of_whole_prompts_and_chunks(made: Made, family: str) -> None:
    """Every token's own log-probability, from prompts cut anywhere."""
    folder, oracle = made(family)
    vision: Any = Driver(folder).model.vision
    ids = ids_with(vision, family, [0, 3])
    with torch.inference_mode():
        shown = eyes.inputs(family, [0, 3], ids)
        logits = oracle(torch.tensor([ids]), use_cache=False, **shown).logits
    expected = logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    images = [eyes.image(family, seed) for seed in (0, 3)]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    for budget in (512, 7):
        with LLM(str(folder), max_num_batched_tokens=budget, block_size=4) as llm:
            out = llm.generate(ids, params, images=images)[0]
        assert out.prompt_logprobs is not None
        found = torch.tensor([entry.logprob for entry in out.prompt_logprobs])
        assert (found - expected).abs().max() <= 10 * TOLERANCE
    assert expected.std() > 1  # so that a wrong place shows


@pytest.mark.parametrize("family", SERVED)
def test_64_greedy_tokens_beside_text_in_chunks_and_preempted(made: Made, family: str) -> None:
    folder, oracle = made(family)
    driver = Driver(folder)
    vision: Any = driver.model.vision
    shown: list[list[int]] = [[0], [], [1, 2], [3], []]
    texts = iter([prompt(31, 6), prompt(32, 17)])
    prompts = [ids_with(vision, family, s) if s else next(texts) for s in shown]
    # The longest prompt with its answer fits, all of them do not.
    longest = max(map(len, prompts)) + 64
    beside = 2 * -(-vision.places.attended // 4)
    memory = (longest // 4 + 4 + beside) * bytes_per_block(driver.model.specs, 4, torch.float32)
    sizes: Any = {"block_size": 4, "max_num_batched_tokens": 9, "max_model_len": longest}
    with LLM(str(folder), kv_memory=memory, max_num_seqs=5, **sizes) as llm:
        images = [[eyes.image(family, seed) for seed in seeds] for seeds in shown]
        found = llm.generate(prompts, GREEDY, images=images)
        assert llm.stats().preemptions > 0
    for ids, seeds, out in zip(prompts, shown, found, strict=True):
        assert list(out.token_ids) == wanted(oracle, family, ids, seeds, 64)


@pytest.mark.parametrize("family", SERVED)
def test_a_prefix_is_hit_with_the_same_image_only(made: Made, family: str) -> None:
    folder, oracle = made(family)
    vision: Any = Driver(folder).model.vision
    same, other = 0, 4 if family in ("llava_next", "mistral3") else 2
    ids = ids_with(vision, family, [same], tail=9)
    few = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    with LLM(str(folder), block_size=4) as llm:
        hits = []
        for seed in (same, same, other, other):
            before = llm.stats().prefix_hit_tokens
            out = llm.generate(ids, few, images=eyes.image(family, seed))[0]
            assert list(out.token_ids) == wanted(oracle, family, ids, [seed], 8)
            hits.append(llm.stats().prefix_hit_tokens - before)
    whole = (len(ids) - 1) // 4 * 4
    assert hits == [0, whole, 4, whole]  # the four tokens before the image are those of both
