"""Mamba-2, Codestral Mamba among them; also in the format of its authors. Source: transformers,
models/mamba2/modeling_mamba2.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mamba import Mamba2, adopt
from kvrun.runtime.models import mamba

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    adopt(w)
    c = w.config
    authors = c.get("ssm_cfg") is not None
    inner = int(c.number("expand", 2) * c.integer("hidden_size"))
    return mamba.decoder(
        w,
        Mamba2,
        tied=authors,
        inner=inner,
        state=c.integer("state_size", 128),
        heads=inner // c.integer("head_dim", 64),
        groups=c.integer("n_groups", 1 if authors else 8),
        limit=c.limits("time_step_limit"),
    )
