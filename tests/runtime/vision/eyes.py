"""Small random checkpoints of models that see images, as the hub has them, and their pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.image_processing_utils import select_best_resolution
from transformers.models.idefics import processing_idefics as packing

from kvrun.runtime.image import Image
from tests.runtime.models.zoo import SMALL

TOKEN = 127  # stands for an image
END = 2  # of a text, where that hides images
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28, "patch_size": 7,
}  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
PERCEIVER = {
    "hidden_size": 64, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4,
    "resampler_head_dim": 16, "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = {**SMALL, "model_type": "llama"}
MISTRAL = {**SMALL, "model_type": "mistral", "sliding_window": None, "head_dim": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "idefics": {
        **SMALL, "num_hidden_layers": 4, "cross_layer_interval": 2, "additional_vocab_size": 2,
        "eos_token_id": END, "qk_layer_norms": True, "use_resampler": True,
        "alpha_type": "vector", "alpha_initializer": "ones",
        "vision_config": {
            "embed_dim": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 7,
        },
        "perceiver_config": {
            "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 4,
            "resampler_head_dim": 16, "qk_layer_norms_perceiver": True,
        },
    },
    "idefics-patches": {
        **SMALL, "cross_layer_interval": 1, "eos_token_id": END, "alpha_initializer": "ones",
        "vision_config": {
            "embed_dim": 48, "intermediate_size": 80, "num_hidden_layers": 1,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 7,
        },
    },
    "llava": {
        "text_config": LLAMA, "vision_config": CLIP, "image_token_index": TOKEN,
        "vision_feature_layer": -2,
    },
    "llava-full": {
        "text_config": LLAMA, "vision_config": CLIP, "image_token_index": TOKEN,
        "vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full",
    },
    "llava-siglip": {
        "text_config": MISTRAL, "vision_config": SIGLIP, "image_token_index": TOKEN,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
    },
    "llava_next": {
        "text_config": MISTRAL, "vision_config": CLIP, "image_token_index": TOKEN,
        "image_grid_pinpoints": PINPOINTS,
    },
    "idefics2": {
        "text_config": MISTRAL, "perceiver_config": PERCEIVER, "image_token_id": TOKEN,
        "vision_config": {
            "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 7,
        },
    },
    "mistral3": {
        "text_config": MISTRAL, "image_token_index": TOKEN, "spatial_merge_size": 2,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "pixtral", "hidden_size": 64, "intermediate_size": 80,
            "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 7,
        },
    },
}  # fmt: skip


def make(folder: Path, family: str, *, vocab: int = 128, token: int = TOKEN) -> Any:
    """Write a random checkpoint to `folder`; the same model in transformers, in fp32."""
    torch.manual_seed(len(family))
    values = {**FAMILIES[family], "image_token_id": token}
    values.pop("image_token_index", None)
    if "text_config" in values:
        values["text_config"] = {**values["text_config"], "vocab_size": vocab}
    else:
        values["vocab_size"] = vocab - values.get("additional_vocab_size", 0)
    config = AutoConfig.for_model(family.split("-")[0], **values)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "alpha" in name:
                parameter += torch.randn_like(parameter) * (0.3 if "bias" in name else 0.1)
            else:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


def _noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _llava(seed: int) -> dict[str, np.ndarray]:
    return {"pixel_values": _noise(seed, 3, 28, 28)}


def _llava_next(seed: int) -> dict[str, np.ndarray]:
    size = [(30, 70), (90, 20), (50, 41), (20, 60)][seed % 4]
    height, width = select_best_resolution(size, PINPOINTS)
    tiles = 1 + (height // 28) * (width // 28)
    return {"pixel_values": _noise(seed, tiles, 3, 28, 28), "image_sizes": np.array(size)}


def _idefics2(seed: int) -> dict[str, np.ndarray]:
    parts = 1 + 4 * (seed % 2)
    pixels, mask = _noise(seed, parts, 3, 30, 37), np.zeros((parts, 30, 37), np.uint8)
    for part in range(parts):
        mask[part, : 30 - 7 * (part % 2), : 37 - 4 * part] = 1
    return {"pixel_values": pixels * mask[:, None], "pixel_attention_mask": mask}


def _mistral3(seed: int) -> dict[str, np.ndarray]:
    height, width = [(28, 42), (14, 56), (42, 14), (28, 28)][seed % 4]
    shown = _noise(seed, 3, height, width)
    return {"pixel_values": shown, "image_sizes": np.array((height, width))}


_PIXELS: dict[str, Callable[[int], dict[str, np.ndarray]]] = {
    "idefics": _llava,
    "llava": _llava,
    "llava_next": _llava_next,
    "idefics2": _idefics2,
    "mistral3": _mistral3,
}


def pixels(family: str, seed: int) -> dict[str, np.ndarray]:
    """What a processor of the family could have made of an image."""
    return _PIXELS[family.split("-")[0]](seed)


def image(family: str, seed: int) -> Image:
    return Image.of(pixels(family, seed))


class _Words:
    eos_token_id = END

    def convert_tokens_to_ids(self, word: str) -> int:
        return TOKEN


def _attended(seeds: list[int], ids: list[int]) -> dict[str, torch.Tensor]:
    """As Idefics' own processor has them; without images there is an empty one."""
    if not seeds:
        nothing = torch.zeros(1, len(ids), 1, dtype=torch.bool)
        return {"pixel_values": torch.zeros(1, 1, 3, 28, 28), "image_attention_mask": nothing}
    known = torch.tensor([ids])
    mask, _ = packing.image_attention_mask_for_packed_input_ids(known, _Words(), "pt")
    mask = packing.incremental_to_binary_attention_mask(mask, "pt", num_classes=len(seeds))
    shown = [torch.from_numpy(_llava(seed)["pixel_values"]) for seed in seeds]
    return {"pixel_values": torch.stack(shown)[None], "image_attention_mask": mask}


def inputs(family: str, seeds: list[int], ids: list[int] | None = None) -> dict[str, torch.Tensor]:
    """The images as the model in transformers takes them, with one prompt, `ids`."""
    if family.startswith("idefics") and family != "idefics2":
        return _attended(seeds, ids or [TOKEN] * len(seeds))
    if not seeds:
        return {}
    each = [pixels(family, seed) for seed in seeds]
    found: dict[str, torch.Tensor] = {}
    for name in each[0]:
        parts = [torch.from_numpy(np.asarray(one[name])) for one in each]
        if name == "pixel_values" and family == "mistral3":
            sides = [max(part.shape[dim] for part in parts) for dim in (1, 2)]
            parts = [F.pad(p, (0, sides[1] - p.shape[2], 0, sides[0] - p.shape[1])) for p in parts]
        if name == "pixel_values" and family == "llava_next":
            most = max(len(part) for part in parts)
            parts = [torch.cat((p, p.new_zeros(most - len(p), *p.shape[1:]))) for p in parts]
        if family == "idefics2":
            found[name] = torch.cat(parts)[None]
            if name.endswith("mask"):
                found[name] = found[name].bool()
        else:
            found[name] = torch.stack(parts)
    return found
