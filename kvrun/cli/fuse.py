"""kvrun fuse: an adapter added to a model's weights, as a model of its own."""

from pathlib import Path
from typing import Annotated

import typer

from kvrun.cli import _options as options
from kvrun.cli._interrupt import import_torch
from kvrun.errors import KvrunError

PANEL = "Models"
EXAMPLES = (
    "kvrun fuse tiny pirate -o pirate-tiny            then: kvrun chat ./pirate-tiny",
    "kvrun fuse Qwen/Qwen3-0.6B ./my-adapter -o out   a PEFT folder and a model of the cache",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a built-in model or ORG/NAME[@REV].",
        autocompletion=options.complete_model,
    ),
]
Adapter = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="One of the model's own by name, or a PEFT folder.")
]
Out = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="The new folder; it must not exist yet."),
]


def command(model: Model, adapter: Adapter, output: Out) -> None:
    """Add a LoRA adapter to a model's weights: W + scale · B · A, stored as the model is.

    DoRA, biases, saved modules, embeddings and experts too.
    Tokenizer and configuration are copied. Serving the adapter beside others needs none of this.
    """
    import_torch()
    from safetensors import SafetensorError

    from kvrun.chat.plain import note
    from kvrun.hub.local import resolve, resolve_adapter
    from kvrun.runtime.lora.fuse import fuse

    try:
        changed = fuse(resolve(model), resolve_adapter(model, adapter), output)
    except SafetensorError as error:  # how a disk without room is told
        raise KvrunError(f"{output} cannot be written.", cause=str(error)) from error
    note(f"{changed} matrices changed; kvrun chat {output}")
