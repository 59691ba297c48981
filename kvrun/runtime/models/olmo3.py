"""OLMo 3: OLMo 2 with a window, and unscaled rotations, on three layers of four. Source:
transformers, models/olmo3/modeling_olmo3.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Sandwich
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama, olmo2

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5)
    c, size = w.config, llama.heads(w).head_dim
    theta = c.number("rope_theta", 500000.0)
    local = c.rope("sliding_attention", theta=theta, scaled=False)
    ropes = [
        Rope(parameters, size, w.dtype, w.device)
        for parameters in (local, c.rope("full_attention", theta=theta))
    ]
    return llama.decoder(w, block, rope=ropes)


def block(w: "Checkpoint", n: int, ropes: list[Rope]) -> Sandwich:
    window = w.config.window(n, every=4)
    return olmo2.block(w, n, ropes[window is None], window)
