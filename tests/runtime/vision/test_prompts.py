"""Images in prompts as transformers' own processors put them there, and files that are refused."""

import base64
import io
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from transformers import PixtralImageProcessorPil

from kvrun import errors
from kvrun.errors import BadCheckpoint, InvalidRequest, MissingExtra, NotFound
from kvrun.runtime.text import Text, images
from tests.runtime.vision import eyes, readers
from tests.runtime.vision.readers import WORD, picture, png

SIZES = [(61, 40), (30, 90), (28, 28), (200, 20)]


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics2"])
def test_prompts_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    processor, _ = readers.make(tmp_path, family)
    text = Text(tmp_path)
    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    words = "One <image>and<image> <image><image>\ntell me"
    found = text.encode_with(words, pictures)
    theirs = processor(text=[words], images=pictures, return_tensors="np")
    assert found.ids == theirs["input_ids"][0].tolist()
    where: Any = text.images
    counts = [where._places.count(image) for image in found.images]
    assert sum(counts) == found.ids.count(WORD)
    if family == "llava_next":
        assert len(set(counts)) > 1
    for picked, image in zip(pictures, found.images, strict=True):
        made = processor.image_processor(picked, return_tensors="np")
        assert set(image.arrays) == set(where._places.arrays)
        for name, array in image.arrays.items():
            assert array.shape == made[name][0].shape
            got = np.frombuffer(array.data, array.dtype).reshape(array.shape)
            assert (got == made[name][0]).all()


def test_prompts_that_attend_to_images_are_those_of_transformers(tmp_path: Path) -> None:
    processor, _ = readers.make(tmp_path, "idefics")
    text, shown = Text(tmp_path), [picture(seed, size) for seed, size in enumerate(SIZES)]
    found = text.encode_with("One <image> and<image> <image>\nso: <image>", shown)
    asked = ["One ", shown[0], " and", shown[1], shown[2], "\nso: ", shown[3]]
    theirs = processor(text=asked, return_tensors="pt")
    assert found.ids == theirs["input_ids"][0].tolist()
    assert found.ids.count(WORD) == 4
    for image, pixels in zip(found.images, theirs["pixel_values"][0], strict=True):
        array = image.arrays["pixel_values"]
        got = np.frombuffer(array.data, array.dtype).reshape(array.shape)
        assert (got == pixels.numpy()).all()


def test_instruct_versions_are_asked_as_their_makers_say(tmp_path: Path) -> None:
    processor, _ = readers.make(tmp_path, "idefics")
    (tmp_path / "chat_template.jinja").unlink()
    text, end = Text(tmp_path), "<end_of_utterance>"
    asked = [
        {"role": "user", "content": [{"type": "image", "image": png(1)},
                                     {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "Idefix."},
        {"role": "user", "content": "Sure?"},
    ]  # fmt: skip
    found = text.converse(asked)
    words = f"Who?{end}\nAssistant: Idefix.{end}\nUser: Sure?{end}\nAssistant:"
    theirs = processor(text=["User:", picture(1), words], return_tensors="pt")
    assert found.ids == theirs["input_ids"][0].tolist()
    assert text.eos_token_ids[-1] == text.encode(end)[0]
    # Of the first version, which knows no turns, nobody says how it is asked.
    tokens = json.loads((tmp_path / "tokenizer.json").read_text().replace(end, "<other>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    assert not Text(tmp_path).chat_template_known


def test_rows_of_features_end_in_words_of_their_own(tmp_path: Path) -> None:
    """Of Mistral 3, whose whole processor wants torchvision; its image processor does not."""
    readers.tokenizer().save(str(tmp_path / "tokenizer.json"))
    values = {**eyes.FAMILIES["mistral3"], "model_type": "mistral3", "image_token_index": WORD}
    (tmp_path / "config.json").write_text(json.dumps(values))
    taken = PixtralImageProcessorPil(size={"longest_edge": 60}, patch_size=7)
    taken.save_pretrained(tmp_path)
    text, shown = Text(tmp_path), picture(1, (61, 40))
    found = text.encode_with("a<image>b", [shown])
    made = taken(shown, return_tensors="np", patch_size={"height": 14, "width": 14})
    high, wide = made["image_sizes"][0]
    assert (high % 14, wide % 14) == (0, 0)
    rows = ["<image>" * (wide // 14)] * (high // 14)
    assert len(rows) > 1
    assert found.ids == text.encode("a" + "[IMG_BREAK]".join(rows) + "[IMG_END]b")
    array = found.images[0].arrays["pixel_values"]
    got = np.frombuffer(array.data, array.dtype).reshape(array.shape)
    assert (got == made["pixel_values"][0]).all()


def parts(*content: Any) -> list[dict[str, Any]]:
    texts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return [{"role": "user", "content": texts}]


def test_chats_have_images_where_the_template_puts_them(tmp_path: Path) -> None:
    readers.make(tmp_path, "llava")
    text = Text(tmp_path)
    image = {"type": "image", "image": png(1)}
    found = text.converse(parts("What is ", image, "?"))
    assert found.ids == text.encode("user: What is " + "<image>" * 16 + "?\nassistant:")
    assert len(found.images) == 1
    again = text.converse(parts(image, image))
    assert again.images[0] is again.images[1]  # made once
    assert again.images[0].digest == found.images[0].digest
    assert text.converse(parts({"type": "image", "image": png(2)})).images != found.images
    # The template only knows lists of parts.
    plain = text.converse([{"role": "user", "content": "Hello"}])
    assert plain.ids == text.encode("user: Hello\nassistant:")


def test_written_words_show_nothing(tmp_path: Path) -> None:
    """Who writes the image's word in a message has written text."""
    readers.make(tmp_path, "llava")
    text = Text(tmp_path)
    found = text.converse(parts("a <image> ", {"type": "image", "image": png(1)}))
    assert found.ids.count(WORD) == 16
    assert text.decode(found.ids).count("<image>") == 1  # the places are not shown
    assert WORD not in text.chat([{"role": "user", "content": "<image>"}])


def test_more_or_fewer_words_than_images(tmp_path: Path) -> None:
    readers.make(tmp_path, "llava")
    text = Text(tmp_path)
    for words in ("none", "<image> and <image>"):
        with pytest.raises(InvalidRequest, match="1 were given"):
            text.encode_with(words, [png(1)])
    with pytest.raises(InvalidRequest, match="65 images; 64"):
        text.encode_with("<image>" * 65, [png(1)] * 65)


def test_models_that_read_only_text(model: Path) -> None:
    text = Text(model)
    for ask in (
        lambda: text.converse(parts({"type": "image", "image": png(1)})),
        lambda: text.encode_with("<image>", [png(1)]),
    ):
        with pytest.raises(InvalidRequest, match="reads only text"):
            ask()


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return size + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def gif() -> bytes:
    picture(1).save(file := io.BytesIO(), "GIF")
    return file.getvalue()


def animated() -> bytes:
    picture(1).save(file := io.BytesIO(), "PNG", save_all=True, append_images=[picture(2)])
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no PNG or JPEG"),
        (b"hello, I am a text", "no PNG or JPEG"),
        (gif(), "no PNG or JPEG"),
        (png(1)[:200], "cannot be read"),
        (bomb(50_000, 50_000), "more than 20,000,000 pixels"),
        (bomb(5_000, 4_001), "20,000,000"),
        (bomb(5_000, 99), "50 times"),
        (animated(), "several frames"),
    ],
    ids=["empty", "text", "gif", "cut off", "bomb", "large", "thin", "animated"],
)
def test_files_that_are_refused(tmp_path: Path, data: bytes, why: str) -> None:
    readers.make(tmp_path, "llava")
    with pytest.raises(InvalidRequest, match=why):
        Text(tmp_path).encode_with("<image>", [data])


def test_the_image_that_is_refused_is_named(tmp_path: Path) -> None:
    readers.make(tmp_path, "llava")
    text, path = Text(tmp_path), tmp_path / "notes.txt"
    path.write_text("hello, I am a text")
    name = re.escape(str(path))
    for source in (path, str(path)):
        with pytest.raises(InvalidRequest, match=f"^{name} is no PNG or JPEG image"):
            text.encode_with("<image><image>", [png(1), source])
        with pytest.raises(InvalidRequest, match=f"^{name} is no PNG or JPEG image"):
            text.converse(parts({"type": "image", "image": source}), local=True)
    url = "data:image/png;base64," + base64.b64encode(bomb(5_000, 4_001)).decode()
    for data in (bomb(5_000, 4_001), url):
        with pytest.raises(InvalidRequest, match=r"^image 2 of the request has 5,000 x 4,001"):
            text.encode_with("<image><image>", [png(1), data])


def test_files_that_are_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers.make(tmp_path, "llava")
    from kvrun.runtime.vision import processor

    monkeypatch.setattr(processor, "BYTES", 1000)
    with pytest.raises(InvalidRequest, match="1,000 are taken"):
        Text(tmp_path).encode_with("<image>", [png(1)])


def test_pictures_are_turned_as_they_say(tmp_path: Path) -> None:
    readers.make(tmp_path, "llava")
    text = Text(tmp_path)
    exif = Pillow.Exif()
    exif[0x0112] = 6  # lies on its side
    turned = text.encode_with("<image>", [png(1, exif=exif)]).images[0]
    upright = picture(1).transpose(Pillow.Transpose.ROTATE_270)
    assert turned == text.encode_with("<image>", [upright]).images[0]
    assert turned != text.encode_with("<image>", [png(1)]).images[0]


def test_where_images_may_come_from(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    url = "data:image/png;base64," + base64.b64encode(png(1)).decode()
    for source in (path, str(path), url, png(1), picture(1)):
        assert images.file_at(source)[:4] == b"\x89PNG"
    shown = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    assert images.with_files([{"role": "user", "content": shown}])[0]["content"] == [
        {"type": "image", "image": png(1)}, shown[1],
    ]  # fmt: skip
    for wrong in ("http://x/a.png", "https://x/a.png", "file:///etc/passwd", "data:image/png,abc",
                  "data:image/png;base64,???"):  # fmt: skip
        with pytest.raises(InvalidRequest, match="no URL is ever fetched|not in base64"):
            images.file_at(wrong)
    with pytest.raises(NotFound, match=r"b\.png"):
        images.file_at(tmp_path / "b.png")
    with pytest.raises(InvalidRequest, match="int is no image"):
        images.file_at(3)


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers.make(tmp_path, "llava")

    def load(package: str, name: str) -> Any:
        raise errors.MissingExtra("'processor' needs the package 'PIL'.", "PIL")

    monkeypatch.setattr(images, "load", load)
    with pytest.raises(MissingExtra, match="images need Pillow") as caught:
        Text(tmp_path).encode_with("<image>", [png(1)])
    assert "kvrun[vision]" in caught.value.hint


def test_a_folder_without_an_image_processor(tmp_path: Path) -> None:
    readers.make(tmp_path, "llava")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(BadCheckpoint, match="image processor"):
        Text(tmp_path).encode_with("<image>", [png(1)])
