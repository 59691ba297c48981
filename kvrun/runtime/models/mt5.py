"""mT5: T5 v1.1 in a hundred languages. Source: transformers, models/mt5/modeling_mt5.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.encoder import EncoderDecoder
from kvrun.runtime.models import t5

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> EncoderDecoder:
    w.config.defaults(feed_forward_proj="gated-gelu")
    return t5.build(w, scaled=False)
