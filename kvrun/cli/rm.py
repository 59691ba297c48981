"""kvrun rm: remove models and adapters from the Hugging Face cache."""

import json
import sys
from typing import Annotated

import typer

from kvrun.cli import _options as options
from kvrun.errors import InvalidRequest

PANEL = "Models"
EXAMPLES = (
    "kvrun rm Qwen/Qwen3-0.6B          all of it, after asking",
    "kvrun rm Qwen/Qwen3-0.6B@REV      one revision, and what only it needs",
    "kvrun rm --yes $(kvrun ls -q | grep SmolLM)",
)

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...", help="ORG/NAME[@REV], as kvrun ls names them.", show_default=False,
        autocompletion=options.complete_model,
    ),
]  # fmt: skip
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def command(
    models: Names, yes: Yes = False, as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Remove models from the Hugging Face cache, which other programs use too."""
    from kvrun.chat.plain import is_terminal, note
    from kvrun.cli._ask import ask
    from kvrun.hub.cache import check_removable, remove
    from kvrun.runtime.plan import size

    for name in models:
        check_removable(name)
    if not yes:
        if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
            raise InvalidRequest("nobody can be asked whether to remove it.", hint="add --yes")
        if not ask(f"remove {', '.join(models)}?"):
            raise typer.Exit(1)
    freed = 0
    for name in models:
        bytes_freed = remove(name)
        freed += bytes_freed
        if not quiet and not as_json:
            note(f"removed {name}: {size(bytes_freed)}")
    if as_json:
        print(json.dumps({"removed": models, "bytes": freed}))
