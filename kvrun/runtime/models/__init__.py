"""JOB: one file per HF `model_type`; its build(w) composes layers by tensor name."""

import difflib
from typing import TYPE_CHECKING, cast

from kvrun import folder
from kvrun.errors import Unsupported
from kvrun.runtime.layers.decoder import Decoder

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


# Where the text model of a vision-language model lies, and what lies beside it.
_TEXT_PARTS = ("language_model.model.", "model.language_model.")
_TOWERS = ("vision_tower.", "multi_modal_projector.", "vision_model.", "image_newline")


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
    _find_text_part(checkpoint)
    return cast(Decoder, folder.load(__name__, kind).build(checkpoint))


def _find_text_part(w: "Checkpoint") -> None:
    for prefix in _TEXT_PARTS:
        if w.has(f"{prefix}embed_tokens.weight", otherwise=False):
            if w.has("language_model.lm_head.weight", otherwise=False):
                w.rename("lm_head.", "language_model.lm_head.")
            w.rename("model.", prefix)
            w.skip(*_TOWERS, *(f"model.{tower}" for tower in _TOWERS))
