"""What an engine refuses of images before it computes anything, and what it survives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvrun import LLM, SamplingParams
from kvrun import folder as registry
from kvrun.errors import BadCheckpoint, InvalidRequest
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.engine import features
from kvrun.runtime.engine.features import Features
from kvrun.runtime.image import Array, Image
from kvrun.runtime.models import build
from kvrun.runtime.text import places
from tests.runtime.driver import Driver
from tests.runtime.models import zoo
from tests.runtime.vision import eyes
from tests.runtime.vision.conftest import Made
from tests.runtime.vision.eyes import TOKEN

ONE = SamplingParams(max_tokens=1, temperature=0)
PLACES = {"llava": 16, "llava_next": 60, "idefics": 1, "idefics2": 5, "mistral3": 6}


def refused(llm: LLM, ids: list[int], image: Image, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        llm.generate(ids, ONE, images=image)


def changed(image: Image, name: str, array: np.ndarray) -> Image:
    found = {n: np.frombuffer(a.data, a.dtype).reshape(a.shape) for n, a in image.arrays.items()}
    return Image.of({**found, name: array})


def test_text_models_take_no_images(tmp_path: Path) -> None:
    zoo.make(tmp_path, "llama", "v2")
    with LLM(str(tmp_path)) as llm:
        refused(llm, [1, 2], eyes.image("llava", 0), "reads only text")


@pytest.mark.parametrize("family", list(PLACES))
def test_images_that_do_not_fit_their_places(made: Made, family: str) -> None:
    image, count = eyes.image(family, 0), PLACES[family]
    with LLM(str(made(family)[0])) as llm:
        for wrong in (0, count - 1, count + 1):
            why = f"{count} features; the prompt has {wrong}"
            if family == "idefics":
                why = f"there is {count} image; the prompt has {wrong}"
            refused(llm, [1, *[TOKEN] * wrong, 2], image, why)
        ids = [1, *[TOKEN] * count, 2]
        assert len(llm.generate(ids, ONE, images=image)[0].token_ids) == 1
        refused(llm, ids, Image(arrays={}, digest=b""), "no array 'pixel_values'")
        short = Array("float32", image.arrays["pixel_values"].shape, b"1234")
        lies = Image(arrays={**image.arrays, "pixel_values": short}, digest=b"1")
        refused(llm, ids, lies, "not of the size it says")
        negative = Array("float32", (-1,) * len(short.shape), b"1234")
        lies = Image(arrays={**image.arrays, "pixel_values": negative}, digest=b"1")
        refused(llm, ids, lies, "not of the size it says")


def test_images_of_wrong_shapes(made: Made) -> None:
    image = eyes.image("llava", 0)
    with LLM(str(made("llava")[0])) as llm:
        small = changed(image, "pixel_values", np.zeros((3, 28, 21), np.float32))
        refused(llm, [TOKEN] * 16, small, r"\[3, 28, 21\]; the model takes \[3, 28, 28\]")
    with LLM(str(made("idefics")[0])) as llm:
        refused(llm, [TOKEN], small, r"\[3, 28, 21\]; the model takes \[3, 28, 28\]")
    image = eyes.image("llava_next", 0)
    with LLM(str(made("llava_next")[0])) as llm:
        for sizes in (np.array([0, 4]), np.array([4, 4, 4])):
            refused(llm, [TOKEN] * 60, changed(image, "image_sizes", sizes), "height and width")
        wide = changed(image, "image_sizes", np.array([20, 20]))
        refused(llm, [TOKEN] * 60, wide, "not as the model takes")
    image = eyes.image("mistral3", 0)
    with LLM(str(made("mistral3")[0])) as llm:
        for size in ((28, 41), (0, 42), (42, 42)):
            refused(
                llm, [TOKEN] * 6, changed(image, "image_sizes", np.array(size)), "squares of 14"
            )
    image = eyes.image("idefics2", 0)
    with LLM(str(made("idefics2")[0])) as llm:
        mask = changed(image, "pixel_attention_mask", np.ones((1, 30, 36), np.uint8))
        refused(llm, [TOKEN] * 5, mask, "not of one size")


def test_of_an_unknown_tower_the_text_part_runs(tmp_path: Path) -> None:
    eyes.make(tmp_path, "llava")
    values = json.loads((tmp_path / "config.json").read_text())
    values["vision_config"]["model_type"] = "pixtral"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with LLM(str(tmp_path)) as llm:
        assert len(llm.generate([1, 2, 3], ONE)[0].token_ids) == 1
        refused(llm, [TOKEN] * 16, eyes.image("llava", 0), "reads only text")


def test_the_families_that_are_known_have_towers() -> None:
    assert sorted(places.KINDS) == registry.names("kvrun.runtime.vision.towers")


def test_adapters_do_not_change_what_is_seen(made: Made) -> None:
    model = Driver(made("llava")[0]).model
    names = [shard.name for shards in model.products for shard in shards]
    assert names
    assert not [name for name in names if "vision" in name or "projector" in name]


def test_features_are_computed_once_and_forgotten_in_their_turn() -> None:
    asked: list[bytes] = []

    class Eyes:
        def __call__(self, image: Image) -> torch.Tensor:
            asked.append(image.digest)
            return torch.zeros(4, 8)  # 128 bytes

    kept = Features(Eyes(), 300)  # type: ignore[arg-type]
    a, b, c = (eyes.image("llava", seed) for seed in range(3))
    for image in (a, b, a, c, a, b):
        kept.look(image)
    assert asked == [image.digest for image in (a, b, c, b)]


def test_room_for_features_is_planned(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made("llava")[0]
    sizes: Any = {"block_size": 4, "kv_memory": 0.5, "max_num_seqs": 10_000}
    free = 64 << 20
    monkeypatch.setattr("kvrun.runtime.engine.start._free_bytes", lambda device: free)
    monkeypatch.setattr(features, "FRACTION", 0.25)

    def bytes_of_cache() -> int:
        with LLM(str(folder), lora_memory=1 << 20, **sizes) as llm:
            return llm.ready.kv_tokens

    some = bytes_of_cache()
    monkeypatch.setattr(features, "FRACTION", 0.75)
    assert bytes_of_cache() < some / 2


def test_a_tower_that_fails_takes_nobody_with_it(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made("llava")[0]
    ids = [1, *[TOKEN] * 16, 2]
    with LLM(str(folder)) as llm:
        alone = llm.generate([[5, 6]], ONE)[0].token_ids
    real = Features.look
    bad = eyes.image("llava", 1)

    def look(self: Features, image: Image) -> torch.Tensor:
        if image.digest == bad.digest:
            raise RuntimeError("no")
        return real(self, image)

    monkeypatch.setattr(Features, "look", look)
    with LLM(str(folder)) as llm:
        found = llm.generate([[5, 6], ids, ids], ONE, images=[None, bad, eyes.image("llava", 0)])
    assert [out.finish_reason for out in found] == ["length", "error", "length"]
    assert found[0].token_ids == alone


@pytest.mark.parametrize("family", list(PLACES))
def test_surplus_and_missing_tensors_of_towers_are_named(tmp_path: Path, family: str) -> None:
    eyes.make(tmp_path, family)
    parts = {"idefics": "perceiver_resampler.", "idefics2": "connector."}
    part = parts.get(family, "multi_modal_projector.")
    gone: list[str] = []

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gone.append(next(name for name in tensors if part in name))
        rest = {name: t for name, t in tensors.items() if name != gone[0]}
        return {**rest, gone[0] + ".more": torch.ones(1)}

    zoo.edit_tensors(tmp_path, spoil)
    with pytest.raises(BadCheckpoint) as caught:
        build(Checkpoint(tmp_path))
    assert f"missing: {gone[0]}" in caught.value.cause
    assert gone[0] + ".more" in caught.value.cause


def test_rounding_leaves_the_towers_alone(made: Made) -> None:
    """Features in 16 or 32 bits: a tower is small, and suffers more."""
    folder = made("llava_next")[0]
    image = eyes.image("llava_next", 0)
    plain, rounded = (build(Checkpoint(folder, quantize=form)).vision for form in (None, "int8"))
    assert plain is not None
    assert rounded is not None
    with torch.inference_mode():
        assert torch.equal(plain(image), rounded(image))
