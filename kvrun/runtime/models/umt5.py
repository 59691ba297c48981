"""UMT5: mT5 with biases by distance in every layer.
Source: transformers, models/umt5/modeling_umt5.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.encoder import EncoderDecoder
from kvrun.runtime.models import t5

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> EncoderDecoder:
    w.config.defaults(feed_forward_proj="gated-gelu")
    return t5.build(w, every=True)
