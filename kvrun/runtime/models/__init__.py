"""JOB: one file per HF `model_type`; its build(w) composes layers by tensor name."""

from typing import TYPE_CHECKING, cast

from kvrun import folder
from kvrun.errors import Unsupported
from kvrun.runtime.layers.decoder import Decoder

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(checkpoint: "Checkpoint") -> Decoder:
    """The model of a checkpoint, with its weights read.

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
    known = folder.names(__name__)
    if kind not in known:
        raise Unsupported(
            f"the architecture '{kind}' is not supported.", hint=f"known: {', '.join(known)}"
        )
    return cast(Decoder, folder.load(__name__, kind).build(checkpoint))
