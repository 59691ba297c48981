"""Model folders with a tokenizer, a template and an image processor, and pictures to show them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tests.runtime.vision import eyes

VOCAB, WORD = 264, 256  # bytes first
ADDED = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "</s>", "[IMG_BREAK]",
         "[IMG_END]")  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% elif c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True) for word in ADDED])
    return made


def make(folder: Path, family: str, *, weights: bool = False) -> tuple[Any, Any]:
    """A folder that images can be put into prompts for: transformers' processor and, with
    `weights`, its model."""
    model = eyes.make(folder, family, vocab=VOCAB, token=WORD) if weights else None
    if not weights:
        values = {**eyes.FAMILIES[family], "model_type": family, "image_token_id": WORD}
        (folder / "config.json").write_text(json.dumps(values))
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), eos_token="</s>", pad_token="</s>"
    )
    square = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    sides: dict[str, Any] = {"patch_size": 7, "vision_feature_select_strategy": "default"}
    if family == "llava":
        taken = CLIPImageProcessorPil(**square)
        processor: Any = LlavaProcessor(taken, words, num_additional_image_tokens=1, **sides)
    elif family == "llava_next":
        taken = LlavaNextImageProcessorPil(**square, image_grid_pinpoints=eyes.PINPOINTS)
        processor = LlavaNextProcessor(taken, words, num_additional_image_tokens=1, **sides)
    elif family == "idefics":
        taken = IdeficsImageProcessorPil(image_size=28)
        words.bos_token = ""  # it puts one before all it makes
        processor = IdeficsProcessor(taken, words)
    else:
        taken = Idefics2ImageProcessorPil(
            size={"shortest_edge": 14, "longest_edge": 40}, do_image_splitting=True
        )
        processor = Idefics2Processor(taken, words, image_seq_len=5)
    processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return processor, model


def picture(seed: int, size: tuple[int, int] = (61, 40)) -> Pillow.Image:
    """Noise of (width, height)."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Pillow.fromarray(values)


def png(seed: int, size: tuple[int, int] = (61, 40), **options: Any) -> bytes:
    picture(seed, size).save(file := io.BytesIO(), "PNG", **options)
    return file.getvalue()
