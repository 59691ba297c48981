"""Places: which tokens of a prompt stand for an image, by the model's configuration alone.

`of` knows the families whose images are taken in. The process that makes text writes these tokens,
the engine puts the image's features in their places.
"""

import re
from collections.abc import Callable
from typing import Any, Protocol

from kvrun.errors import BadCheckpoint, InvalidRequest, Unsupported
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.image import Image

PIXELS, SIZES, MASK = "pixel_values", "image_sizes", "pixel_attention_mask"
# LLaVA-NeXT's, where a config.json does not say which sizes its tiles may make together.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
CLIP_USUAL = {"image_size": 336, "patch_size": 14}


class Places(Protocol):
    """`token` is the id that stands for one feature, `arrays` what its processor gives when it is
    asked with `options`. Where features are `attended` to, so many of each image, one `token` says
    from where on; behind a text that `ends` nothing is seen. 0: they stand in the prompt. `dialog`
    is a chat template, and the token that ends an answer, of models whose files hold none.
    `tower` is the `model_type` of what looks, `pixels` says for people at how many."""

    token: int
    tower: str
    pixels: str
    attended: int
    ends: int
    dialog: tuple[str, str] | None
    arrays: tuple[str, ...]
    options: dict[str, Any]

    def count(self, image: Image) -> int:
        """How many tokens of a prompt stand for an image.

        Raises InvalidRequest for arrays of wrong shapes.
        """

    def text(self, image: Image, word: str) -> str:
        """What a prompt has in the place of one `word`, the text of `token`."""

    def tidy(self, text: str) -> str:
        """What a prompt is once all of its images are in it."""


def of(config: HFConfig) -> Places | None:
    """Where images go in prompts of this model; None for one whose images are not taken in."""
    kind = KINDS.get(config.whole or "")
    try:
        return None if kind is None else kind(config)
    except Unsupported:
        return None  # a tower that is not known; the text part still is


def _token(config: HFConfig, usual: int) -> int:
    return config.count("image_token_id", config.count("image_token_index", usual))


def said_type(config: HFConfig, part: str, usual: str) -> str:
    """The `model_type` of a part of a configuration."""
    said = config.get(part, {})
    kind = said.get("model_type") if isinstance(said, dict) else None
    return kind if isinstance(kind, str) else usual


def fit(size: tuple[int, int], sizes: list[list[int]]) -> tuple[int, int]:
    """The size (height, width) of those that keeps most of an image and wastes least."""
    height, width = size

    def merit(other: list[int]) -> tuple[int, int]:
        scale = min(other[1] / width, other[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - other[0] * other[1]

    best = max(sizes, key=merit)
    return best[0], best[1]


def unpadded(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """How many rows and columns of features on each side are padding, of a grid [rows, columns]
    that an image of `size` (height, width) was put into."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


class _Placed:
    """Features stand in the prompt."""

    attended, ends = 0, -1
    dialog: tuple[str, str] | None = None

    def tidy(self, text: str) -> str:
        return text


class Llava(_Placed):
    """Every patch is a feature, and the class token where it is kept."""

    arrays: tuple[str, ...] = (PIXELS,)

    def __init__(self, config: HFConfig) -> None:
        self.token = _token(config, 32000)
        self.options: dict[str, Any] = {}
        vision = config.part("vision_config")
        vision.defaults(**CLIP_USUAL)
        self.size, self.patch = vision.integer("image_size"), vision.integer("patch_size")
        self.side = self.size // self.patch
        self.pixels = f"{self.size} × {self.size}"
        self.tower = said_type(config, "vision_config", CLIP)
        if self.tower not in (CLIP, SIGLIP):
            raise Unsupported(f"the tower '{self.tower}' of this model is not known.")
        # Towers without a class token lose their first patch to the usual choice of features.
        self.classed = self.tower == CLIP
        self.cut = config.text("vision_feature_select_strategy", "default") != "full"

    def count(self, image: Image) -> int:
        self._check(image.shape(PIXELS, 3))
        return self.base

    @property
    def base(self) -> int:
        """Features of one square image."""
        return self.side**2 + self.classed - self.cut

    def text(self, image: Image, word: str) -> str:
        return word * self.count(image)

    def _check(self, shape: tuple[int, ...]) -> None:
        wanted = (3, self.size, self.size)
        if shape[-3:] != wanted:
            raise InvalidRequest(
                f"an image was made {list(shape[-3:])}; the model takes {list(wanted)}."
            )


class LlavaNext(Llava):
    """The image in one square, and again in tiles: rows of patches without padding, each row with
    a newline behind it."""

    arrays: tuple[str, ...] = (PIXELS, SIZES)

    def __init__(self, config: HFConfig) -> None:
        super().__init__(config)
        self.pixels += ", whole and in tiles"
        self.sizes = config.get("image_grid_pinpoints", PINPOINTS)
        if not isinstance(self.sizes, list) or not all(_is_pair(pair) for pair in self.sizes):
            raise BadCheckpoint("config.json: 'image_grid_pinpoints' must be a list of sizes.")
        if self.base != self.side**2:
            raise Unsupported("this tower's class token cannot be laid out in tiles.")

    def grid(self, image: Image) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of tiles, and how many rows and columns of patches on each side are
        padding."""
        shape, size = image.shape(PIXELS, 4), image.numbers(SIZES)
        self._check(shape)
        if len(size) != 2 or min(size) < 1:
            raise InvalidRequest("an image has no height and width.")
        height, width = fit((size[0], size[1]), self.sizes)
        tiles = height // self.size, width // self.size
        if 1 + tiles[0] * tiles[1] != shape[0]:
            raise InvalidRequest(f"an image was cut into {shape[0]} tiles, not as the model takes.")
        patches = tiles[0] * self.side, tiles[1] * self.side
        return tiles, unpadded((size[0], size[1]), patches)

    def count(self, image: Image) -> int:
        (rows, columns), (above, beside) = self.grid(image)
        rows, columns = rows * self.side - 2 * above, columns * self.side - 2 * beside
        return self.base + rows * (columns + 1)


class Idefics:
    """One token for each; the text behind it attends to the image's features."""

    arrays: tuple[str, ...] = (PIXELS,)
    edge = "<fake_token_around_image>"
    # Of the instruct versions, by their model card.
    dialog: tuple[str, str] | None = (
        "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: "
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}"
        "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        "<end_of_utterance>",
    )

    def __init__(self, config: HFConfig) -> None:
        # Two tokens more than Llama's: the one around images, then the image's.
        self.token = _token(config, config.integer("vocab_size", 32000) + 1)
        said = config.get("eos_token_id", 2)
        self.ends = said if isinstance(said, int) else -1
        self.options: dict[str, Any] = {}
        vision = config.part("vision_config")
        self.size = vision.integer("image_size", 224)
        self.tower = said_type(config, "vision_config", "idefics_vision")
        self.pixels = f"{self.size} × {self.size}"
        side = self.size // vision.integer("patch_size", 14)
        self.attended = side**2 + 1
        if config.flag("use_resampler", False):
            perceiver = config.part("perceiver_config")
            self.attended = perceiver.integer("resampler_n_latents", 64)

    def count(self, image: Image) -> int:
        shape, wanted = image.shape(PIXELS, 3), (3, self.size, self.size)
        if shape != wanted:
            raise InvalidRequest(
                f"an image was made {list(shape)}; the model takes {list(wanted)}."
            )
        return 1

    def text(self, image: Image, word: str) -> str:
        return self.edge + word + self.edge

    def tidy(self, text: str) -> str:
        """As the model was trained: no spaces around images, one token between two of them."""
        edge = re.escape(self.edge)
        text = re.sub(f" *({edge}) *", self.edge, text)
        return re.sub(f"({edge}){{2}}", self.edge, text)


class Idefics2(_Placed):
    """A fixed number of latents for each part, between two tokens of their own."""

    arrays: tuple[str, ...] = (PIXELS, MASK)
    edge = "<fake_token_around_image>"
    _behind = re.compile(re.escape(edge) + r"(?=[^\s<])")

    def __init__(self, config: HFConfig) -> None:
        self.token = _token(config, 32001)
        self.options: dict[str, Any] = {}
        self.latents = config.part("perceiver_config").integer("resampler_n_latents", 64)
        vision = config.part("vision_config")
        self.patch, self.size = vision.integer("patch_size", 32), vision.integer("image_size", 224)
        self.tower = said_type(config, "vision_config", "idefics2_vision")
        self.pixels = f"at most {self.size} × {self.size}"

    def count(self, image: Image) -> int:
        parts, channels, height, width = image.shape(PIXELS, 4)
        if image.shape(MASK, 3) != (parts, height, width) or channels != 3:
            raise InvalidRequest("an image and its mask are not of one size.")
        if min(height, width) < self.patch:
            raise InvalidRequest(f"an image is smaller than one patch of {self.patch} pixels.")
        return parts * self.latents

    def text(self, image: Image, word: str) -> str:
        parts = self.count(image) // self.latents
        return (self.edge + word * self.latents + self.edge) * parts

    def tidy(self, text: str) -> str:
        text = text.replace(self.edge * 2, self.edge)
        return self._behind.sub(self.edge + " ", text)


class Mistral3(_Placed):
    """One for each square of patches, with a token of its own behind each row and the last."""

    arrays: tuple[str, ...] = (PIXELS, SIZES)
    row_end, end = "[IMG_BREAK]", "[IMG_END]"

    def __init__(self, config: HFConfig) -> None:
        self.token = _token(config, 10)
        self.tower = said_type(config, "vision_config", "pixtral")
        if self.tower != "pixtral" or config.get("vision_feature_layer", -1) != -1:
            raise Unsupported(f"the tower '{self.tower}' of this model is not known.")
        vision = config.part("vision_config")
        size, self.patch = vision.integer("image_size", 1540), vision.integer("patch_size", 14)
        self.pixels = f"at most {size} × {size}"
        self.merge = config.integer("spatial_merge_size", 2)
        square = self.patch * self.merge
        self.options: dict[str, Any] = {"patch_size": {"height": square, "width": square}}

    def grid(self, image: Image) -> tuple[int, int]:
        """Rows and columns of features."""
        shape, size = image.shape(PIXELS, 3), image.numbers(SIZES)
        square = self.patch * self.merge
        whole = len(size) == 2 and min(size) > 0 and not any(n % square for n in size)
        if not whole or shape[0] != 3 or size[0] > shape[1] or size[1] > shape[2]:
            raise InvalidRequest(f"an image is not made of squares of {square} pixels.")
        return size[0] // square, size[1] // square

    def count(self, image: Image) -> int:
        rows, columns = self.grid(image)
        return rows * columns

    def text(self, image: Image, word: str) -> str:
        rows, columns = self.grid(image)
        return self.row_end.join([word * columns] * rows) + self.end


def _is_pair(pair: object) -> bool:
    ints = isinstance(pair, list) and all(isinstance(n, int) and n > 0 for n in pair)
    return ints and len(pair) == 2  # type: ignore[arg-type]


# By the `model_type` of the whole.
KINDS: dict[str, Callable[[HFConfig], Places]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "idefics": Idefics,
    "idefics2": Idefics2,
    "mistral3": Mistral3,
}
