"""JOB: one file per HF `model_type`; its build(w) composes layers by tensor name."""

import difflib
from typing import TYPE_CHECKING, cast

from kvrun import folder
from kvrun.errors import Unsupported
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.text import places

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.vision import Vision


# Where the text model of a vision-language model lies, and what lies beside it.
_TEXT_PARTS = ("language_model.model.", "model.language_model.", "model.text_model.")
_TOWERS = ("vision_tower.", "multi_modal_projector.", "vision_model.", "connector.",
           "image_newline")  # fmt: skip


def build(checkpoint: "Checkpoint") -> Decoder:
    """The model of a checkpoint, with its weights read; the text part of one that sees images.

    Raises Unsupported for an architecture or option that kvrun does not know, and BadCheckpoint
    when the files do not hold what the configuration describes. Closes the checkpoint.
    """
    try:
        decoder = compose(checkpoint)
        checkpoint.finish()
    finally:
        checkpoint.close()
    return decoder


def compose(checkpoint: "Checkpoint") -> Decoder:
    """`build`, but tensors may be left over and the checkpoint stays open."""
    kind = checkpoint.config.text("model_type")
    if kind not in (known := folder.names(__name__)):
        near = difflib.get_close_matches(kind, known, 1)
        meant = f"did you mean '{near[0]}'? " if near else ""
        raise Unsupported(
            f"the architecture '{kind}' is not supported.",
            hint=f"{meant}known: {', '.join(known)}",
        )
    vision = _vision(checkpoint)
    _find_text_part(checkpoint, skipped=vision is None)
    decoder = cast(Decoder, folder.load(__name__, kind).build(checkpoint))
    decoder.vision = vision
    return decoder


def _vision(w: "Checkpoint") -> "Vision | None":
    """The part that sees, in plain matrices, where the model has one that is known."""
    towers = "kvrun.runtime.vision.towers"
    # Who looks on has the text part read.
    if w.reader is not None or places.of(w.config) is None:
        return None
    rounding, products = w.quantize, len(w.products)
    w.quantize = None
    try:
        return cast("Vision", folder.load(towers, str(w.config.whole)).build(w))
    finally:
        w.quantize = rounding
        del w.products[products:]  # adapters change the text part only


def _find_text_part(w: "Checkpoint", *, skipped: bool) -> None:
    for prefix in _TEXT_PARTS:
        if w.has(f"{prefix}embed_tokens.weight", otherwise=False):
            if w.has("language_model.lm_head.weight", otherwise=False):
                w.rename("lm_head.", "language_model.lm_head.")
            w.rename("model.", prefix)
            if skipped:
                w.skip(*_TOWERS, *(f"model.{tower}" for tower in _TOWERS))
