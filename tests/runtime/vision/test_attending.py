"""Images that are attended to through the whole engine: what is shared, what takes room, faults."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kvrun import LLM, SamplingParams
from kvrun.errors import InvalidRequest
from kvrun.runtime.cache.tensors import bytes_per_block
from kvrun.runtime.engine.request import Request
from kvrun.runtime.layers.cross import CrossDecoder
from kvrun.runtime.vision.towers import idefics as tower
from tests.runtime.models.attending import LONG, SHORT, TEXT, SeeingDriver
from tests.runtime.vision import eyes
from tests.runtime.vision.conftest import Made
from tests.runtime.vision.eyes import END, TOKEN
from tests.runtime.vision.test_engine import wanted

OPTIONS: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
GREEDY = SamplingParams(**OPTIONS)


def test_answers_see_what_the_prompt_ends_with(made: Made) -> None:
    """Also behind a text's end that an answer has written, which a prompt with it does not."""
    folder, oracle = made("idefics")
    images = [eyes.image("idefics", seed) for seed in (0, 1, 2)]
    with LLM(str(folder), block_size=4) as llm:
        first = llm.generate(LONG, GREEDY, images=images)[0].token_ids
        assert list(first) == wanted(oracle, "idefics", LONG, [0, 1, 2], 12)
        forced = SamplingParams(**OPTIONS, logit_bias={END: 100.0})
        ended = [*LONG, *llm.generate(LONG, forced, images=images)[0].token_ids]
        assert ended[len(LONG) :] == [END] * 12
        before = llm.stats().prefix_hit_tokens
        again = llm.generate([*ended, 5], GREEDY, images=images)[0].token_ids
        assert list(again) == wanted(oracle, "idefics", [*ended, 5], [0, 1, 2], 12)
        # Of the answer only what stands before its first end could be the same.
        assert llm.stats().prefix_hit_tokens - before == (len(LONG) + 1) // 4 * 4


def test_images_are_seen_once_whoever_asks(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, oracle = made("idefics")
    looked: list[bytes] = []
    kept: list[int] = []  # rows of keys and values
    real, encode = tower.Idefics.__call__, CrossDecoder.encode

    def look(self: Any, image: Any) -> torch.Tensor:
        looked.append(image.digest)
        return real(self, image)

    def count(self: CrossDecoder, batch: Any) -> None:
        kept.append(len(batch.ids))
        encode(self, batch)

    monkeypatch.setattr(tower.Idefics, "__call__", look)
    monkeypatch.setattr(CrossDecoder, "encode", count)
    twice = [TOKEN, 5, TOKEN, 6]
    with LLM(str(folder), block_size=4) as llm:
        asked = [(LONG, [0, 1, 2]), (SHORT, [1, 3]), (twice, [3, 3])]
        images = [[eyes.image("idefics", seed) for seed in seeds] for _, seeds in asked]
        for ids, shown, (_, seeds) in zip([ids for ids, _ in asked], images, asked, strict=True):
            out = llm.generate(ids, GREEDY, images=shown)[0]
            assert list(out.token_ids) == wanted(oracle, "idefics", ids, seeds, 12)
        pool = llm._engine.scheduler.pool
        # Five features of four images, in blocks of four: nothing is kept twice.
        assert len(llm._engine.scheduler._sources._entries) == 4
        assert len(looked) == len(set(looked)) == 4
        assert sum(kept) == 4 * 5
        assert pool.free == pool.total


def test_choices_share_an_image(made: Made) -> None:
    folder, oracle = made("idefics")
    for caching in (True, False):
        with LLM(str(folder), block_size=4, prefix_caching=caching) as llm:
            params = SamplingParams(**OPTIONS, n=3)
            out = llm.generate(SHORT, params, images=[eyes.image("idefics", s) for s in (1, 3)])[0]
        expected = wanted(oracle, "idefics", SHORT, [1, 3], 12)
        assert [list(choice.token_ids) for choice in out.choices] == [expected] * 3


def test_adapters_change_what_attends_to_images(made: Made, tmp_path: Path) -> None:
    folder, oracle = made("idefics")
    torch.manual_seed(3)
    base = type(oracle).from_pretrained(folder, attn_implementation="eager")
    where = r"model\.(layers|gated_cross_attn_layers)\..*_proj"
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    adapted.save_pretrained(tmp_path)
    images = [eyes.image("idefics", seed) for seed in (0, 1, 2)]
    plain = wanted(oracle, "idefics", LONG, [0, 1, 2], 12)
    changed = wanted(adapted.base_model.model, "idefics", LONG, [0, 1, 2], 12)
    assert changed != plain
    with LLM(str(folder), adapters={"a": str(tmp_path)}, block_size=4) as llm:
        for adapters in (["a", None], [None, "a"]):  # neither takes the other's keys and values
            out = llm.generate([LONG, LONG], GREEDY, adapters, images=[images, images])
            expected = [changed if adapter else plain for adapter in adapters]
            assert [list(one.token_ids) for one in out] == expected


def test_images_need_room_of_their_own(made: Made) -> None:
    folder, oracle = made("idefics")
    specs = SeeingDriver(folder).model.specs
    sizes: Any = {"block_size": 4, "max_model_len": 40, "max_num_seqs": 2}
    sizes["kv_memory"] = 13 * bytes_per_block(specs, 4, torch.float32)
    images = [eyes.image("idefics", seed) for seed in (1, 3)]
    with LLM(str(folder), **sizes) as llm:
        # Twelve blocks; two images take two each.
        unbound = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
        out = llm.generate(SHORT, unbound, images=images)[0]
        assert len(SHORT) + len(out.token_ids) == 32
        assert list(out.token_ids) == wanted(oracle, "idefics", SHORT, [1, 3], 32 - len(SHORT))
        few = SamplingParams(max_tokens=33 - len(SHORT), temperature=0)
        with pytest.raises(InvalidRequest, match=r"take 16 tokens of a cache that has 48; 33 of"):
            llm.generate(SHORT, few, images=images)
        assert len(llm.generate(SHORT[2:], unbound)[0].token_ids) == 35


def test_what_fails_later_takes_its_images_along(made: Made) -> None:
    folder, oracle = made("idefics")
    images = [eyes.image("idefics", seed) for seed in (1, 3)]
    with LLM(str(folder), block_size=4) as llm:
        engine = llm._engine
        engine.add(Request(id="x", prompt_ids=SHORT, params=GREEDY, images=images))
        deltas = engine.step() + engine.step()
        assert sum(len(delta.token_ids) for delta in deltas) == 2
        engine.scheduler.fail(engine.scheduler.running[0], "on purpose")
        while not engine.idle:
            engine.step()
        # Its blocks are cleared, and no longer what others find.
        again = llm.generate(SHORT, GREEDY, images=images)[0].token_ids
        assert list(again) == wanted(oracle, "idefics", SHORT, [1, 3], 12)


def test_what_an_image_breaks_stays_its_own(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, oracle = made("idefics")
    bad, real = eyes.image("idefics", 1), tower.Idefics.__call__
    for wrong in (torch.tensor(float("nan")), None):

        def look(self: Any, image: Any, wrong: Any = wrong) -> torch.Tensor:
            if image.digest == bad.digest and wrong is None:
                raise RuntimeError("this image breaks it")
            return real(self, image) * (wrong if image.digest == bad.digest else 1)

        with LLM(str(folder), block_size=4) as llm:
            with monkeypatch.context() as patch:
                patch.setattr(tower.Idefics, "__call__", look)
                shown = [[bad, eyes.image("idefics", 3)], [eyes.image("idefics", 3)], None]
                asked = [SHORT, SHORT[1:], TEXT]
                out = llm.generate(asked, GREEDY, images=shown)
            assert [one.finish_reason for one in out] == ["error", "length", "length"]
            assert list(out[1].token_ids) == wanted(oracle, "idefics", SHORT[1:], [3], 12)
            assert list(out[2].token_ids) == wanted(oracle, "idefics", TEXT, [], 12)
            llm._engine._runner._features._kept.clear()
            whole = llm.generate(SHORT, GREEDY, images=shown[0])[0]  # nothing bad was kept
            assert list(whole.token_ids) == wanted(oracle, "idefics", SHORT, [1, 3], 12)
