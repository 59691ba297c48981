"""Images in prompts: files -> what crosses to the engine, and their places in the text."""

import base64
import binascii
import io
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tokenizers import Tokenizer

from kvrun.errors import BadCheckpoint, InvalidRequest, KvrunError, MissingExtra, NotFound
from kvrun.folder import load
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.image import Image
from kvrun.runtime.text import places

MOST = 64  # images of a prompt
# Of processed images that are kept: a conversation shows its images again with every turn.
KEPT_BYTES = 128 << 20
IMAGE = {"type": "image"}  # as templates know it
SEEING = tuple(places.KINDS)  # types of models that take images, as config.json names them
NO_EYES = "the model reads only text; it takes no images."


# A path, a data: URL, a file's bytes, a picture of Pillow's, or what a processor made of one.
Picture = object
Pictures = Picture | Sequence[Picture] | None  # of one prompt


class Prompt(NamedTuple):
    """Token ids, and the images that they have places for."""

    ids: list[int]
    images: list[Image]


class _Processor(Protocol):
    def __call__(self, data: bytes, name: str) -> Image: ...


class Images:
    """The images of one model's prompts. Safe to use from threads."""

    def __init__(self, folder: Path, where: places.Places, tokenizer: Tokenizer) -> None:
        word = tokenizer.id_to_token(where.token)
        if word is None:
            raise BadCheckpoint(
                f"the token {where.token}, which stands for images, is not in the tokenizer."
            )
        self._folder, self._places, self.word = folder, where, word
        self._lock = threading.Lock()
        self._made: _Processor | None = None
        self._kept: OrderedDict[bytes, Image] = OrderedDict()

    def look(self, pictures: Sequence[Picture]) -> list[Image]:
        """These pictures as towers take them. Raises InvalidRequest or NotFound for what is no
        image that is taken, MissingExtra without Pillow."""
        if len(pictures) > MOST:
            raise InvalidRequest(f"a prompt has {len(pictures)} images; {MOST} are taken.")
        return [
            p if isinstance(p, Image) else self._look(file_at(p), _name(p, number))
            for number, p in enumerate(pictures, 1)
        ]

    def _look(self, data: bytes, name: str) -> Image:
        key = blake2b(data, digest_size=32).digest()
        with self._lock:
            found = self._kept.pop(key, None) or self._processor(data, name)
            self._kept[key] = found
            while sum(map(_size, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return found

    @property
    def _processor(self) -> _Processor:
        if self._made is None:
            try:
                made = load("kvrun.runtime.vision", "processor")
            except MissingExtra as error:
                raise MissingExtra("images need Pillow, which is not installed.", "PIL") from error
            self._made = made.Processor(self._folder, self._places.arrays, self._places.options)
        return self._made

    def expand(self, text: str, images: Sequence[Image]) -> str:
        """A prompt in which one `word` stands for each image, with as many places as each needs.

        Raises InvalidRequest when there are more or fewer of these words than images.
        """
        parts = text.split(self.word)
        if len(parts) - 1 != len(images):
            raise InvalidRequest(
                f"the prompt has places for {len(parts) - 1} images; {len(images)} were given.",
                hint=f"{self.word} stands for an image",
            )
        if not images:
            return text
        texts = [self._places.text(image, self.word) for image in images]
        joined = "".join(part + text for part, text in zip(parts, [*texts, ""], strict=True))
        return self._places.tidy(joined)


def images_of(folder: Path, tokenizer: Tokenizer) -> Images | None:
    """None for a model that sees nothing."""
    if not (folder / "config.json").is_file():
        return None
    where = places.of(HFConfig.read(folder))
    return None if where is None else Images(folder, where, tokenizer)


def sees(folder: str | Path) -> bool:
    """Whether the model in a folder takes images, by its config.json; False for a damaged one."""
    return places_in(folder) is not None


def dialog_of(folder: Path, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """A chat template and the token that ends an answer, where a model's makers describe both and
    its files hold neither; by its config.json, and None for a damaged one."""
    where = places_in(folder)
    told = None if where is None else where.dialog
    return told if told and tokenizer.token_to_id(told[1]) is not None else None


def places_in(folder: str | Path) -> places.Places | None:
    """Where images go in prompts of the model in a folder, by its config.json; None for one that
    takes none, and for a damaged file."""
    try:
        return places.of(HFConfig.read(folder))
    except KvrunError:
        return None


def _size(image: Image) -> int:
    return sum(len(array.data) for array in image.arrays.values())


def taken_out(
    messages: Sequence[Mapping[str, Any]], *, local: bool = False
) -> tuple[list[Mapping[str, Any]], list[Any]]:
    """Messages as templates know them, and their images, in order.

    An image is a part {"type": "image", "image": its file as bytes}; with `local` it may be
    anything that `file_at` takes.
    """
    files: list[Any] = []

    def plain(part: Any) -> Any:
        if isinstance(part, Mapping) and part.get("type") == "image" and "image" in part:
            data = part["image"]
            if not local and not isinstance(data, bytes):
                raise InvalidRequest("an image is given by its file, as bytes.")
            files.append(data)
            return IMAGE
        return part

    found: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list | tuple):
            message = {**message, "content": [plain(part) for part in content]}
        found.append(message)
    return found, files


def file_at(source: object) -> bytes:
    """An image's file: bytes as they are, a data: URL, a path, or a picture of Pillow's.

    Raises NotFound or InvalidRequest for what cannot be read. For callers on this machine only.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and ("://" in source[:16] or source.startswith("data:")):
        return file_of(source)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"there is no image {path}.") from error
        except OSError as error:
            raise InvalidRequest(
                f"the image {path} cannot be read.", cause=error.strerror or str(error)
            ) from error
    if hasattr(source, "save"):
        source.save(file := io.BytesIO(), "PNG")
        return file.getvalue()
    raise InvalidRequest(f"a {type(source).__name__} is no image.", hint="give a file's path")


def _name(source: object, number: int) -> str:
    """What a message calls an image: its path as it was given, or its place."""
    given = isinstance(source, str) and not source.startswith("data:")
    return str(source) if given or isinstance(source, Path) else f"image {number} of the request"


def of_each(images: Pictures | Sequence[Pictures], count: int | None) -> list[list[Picture]]:
    """The images of so many prompts each; None for a prompt that stands alone."""
    if count is None or images is None:
        alone = list(images) if isinstance(images, list | tuple) else [images]
        return [[] if images is None else alone] * (1 if count is None else count)
    if not isinstance(images, list | tuple) or len(images) != count:
        raise InvalidRequest(f"{count} prompts need a list of images with as many entries.")
    return [of_each(each, None)[0] for each in images]


def with_files(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages in which images may be parts of OpenAI's, for callers on this machine."""

    def plain(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            return {"type": "image", "image": part.get("image")}
        if kind == "image_url":
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, Mapping) else given
            return {"type": "image", "image": file_of(url)}
        return part

    return [
        {**message, "content": [plain(part) for part in content]}
        if isinstance(content := message.get("content"), list | tuple)
        else message
        for message in messages
    ]


def file_of(url: object) -> bytes:
    """The bytes in a data: URL. Raises InvalidRequest for every other URL: none is fetched."""
    if not isinstance(url, str) or not url.startswith("data:"):
        raise InvalidRequest(
            "an image must be a data: URL; no URL is ever fetched.",
            hint="data:image/png;base64,...",
        )
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequest("an image's data: URL is not in base64.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("an image's data: URL is not in base64.", cause=str(error)) from error
