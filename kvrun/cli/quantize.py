"""kvrun quantize: a model into a folder, with fewer bits."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kvrun.cli import _options as options
from kvrun.cli._interrupt import import_torch
from kvrun.errors import InvalidRequest
from kvrun.runtime.config import METHODS

PANEL = "Models"
SAMPLES = 128  # pieces of text, unless more or fewer are asked for
FORMATS = ("compressed-tensors", "gptq", "awq", "bitsandbytes")
EXAMPLES = (
    "kvrun quantize Qwen/Qwen3-0.6B --method int8 -o qwen3-int8       8 bits, nothing to look at",
    "kvrun quantize Qwen/Qwen3-0.6B --method gptq -o qwen3-4bit --check   4 bits, and what it cost",
    "kvrun quantize Qwen/Qwen3-0.6B --method gptq --format gptq -o qwen3-gptq   as AutoGPTQ has it",
    "kvrun quantize ./my-model --method awq --calibration notes.txt -o my-4bit",
)
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a built-in model or ORG/NAME[@REV], in 16 or 32 bits.",
        autocompletion=options.complete_model,
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="The new folder.", rich_help_panel=PANEL),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        help=f"{', '.join(METHODS)}; gptq and awq look at text.",
        rich_help_panel=PANEL,
        autocompletion=lambda: list(METHODS),
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help=f"How it is stored: {', '.join(FORMATS)}; default: {FORMATS[0]}, nf4: {FORMATS[3]}.",
        rich_help_panel=PANEL,
        autocompletion=lambda: list(FORMATS),
    ),
]
Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Plain text that is like what the model will see; builtin is a little of many kinds.",
        rich_help_panel=PANEL,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        "--group-size",
        metavar="N",
        help="Columns that share a scale; default: 128 for 4 bits, a whole row for 8.",
        rich_help_panel=PANEL,
    ),
]
Samples = Annotated[
    int,
    typer.Option("--samples", metavar="N", help="Pieces of text, at most.", rich_help_panel=PANEL),
]
Wanted = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Compare with the original: perplexity, KL, top-1, size.",
        rich_help_panel=PANEL,
    ),
]


def command(
    model: Model,
    output: Output,
    method: Method = "int4",
    format: Format = None,
    calibration: Calibration = "builtin",
    group_size: GroupSize = None,
    samples: Samples = SAMPLES,
    check: Wanted = False,
    device: options.Device = "auto",
) -> None:
    """Quantize a model into a new folder.

    Layer by layer; when it is interrupted, the same command goes on where it was.
    """
    import_torch()
    from kvrun.chat.plain import note
    from kvrun.hub.local import resolve
    from kvrun.runtime.calibrate import job
    from kvrun.runtime.calibrate.samples import prompts

    if samples < 1:
        raise InvalidRequest(f"--samples is {samples}; it must be at least 1.")
    recipe = job.Recipe(model, method, group_size, calibration, samples, format=format)
    folder = resolve(model)
    seen: list[list[int]] = []
    kept: list[list[int]] = []
    if recipe.looks or check:
        seen, kept = prompts(folder, calibration, samples, recipe.sample_length)
    elif calibration != "builtin" or samples != SAMPLES:
        note(f"note: {method} looks at no text; --calibration and --samples have no effect")
    line = _Line()
    job.quantize(
        folder, output, recipe, seen if recipe.looks else [], device=device, progress=line.say
    )
    line.end()
    typer.echo(f"{output} is ready: kvrun chat {output}", err=True)
    if check:
        _check(folder, output, kept, device)


class _Line:
    """One line on stderr with what is done and how long it will take, for people who look."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._first: int | None = None
        self._shown = sys.stderr is not None and sys.stderr.isatty()

    def say(self, done: int, total: int, what: str) -> None:
        if not self._shown:
            return
        if self._first is None:  # layers of an earlier run are done at once
            self._first = done
        spent, new = time.monotonic() - self._begun, done - self._first
        left = f", {_clock(spent / new * (total - done))} left" if new else ""
        print(f"\r\x1b[K{what}{left}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _check(folder: Path, output: Path, kept: Any, device: str) -> None:
    """Print what was lost, and keep it in the recipe."""
    import json
    from dataclasses import asdict

    from kvrun.chat.plain import note
    from kvrun.runtime.calibrate import job
    from kvrun.runtime.calibrate.check import compare
    from kvrun.runtime.plan import size

    found = compare(folder, output, kept, device)
    path = output / job.RECIPE
    recipe = {**json.loads(path.read_text()), "check": asdict(found)}
    path.write_text(json.dumps(recipe, indent=2) + "\n")
    rows = (
        ("", "original", "quantized"),
        ("perplexity", f"{found.perplexity_before:.3f}", f"{found.perplexity:.3f}"),
        ("KL, mean (99 %)", "", f"{found.kl_mean:.4f} ({found.kl_p99:.3f})"),
        ("same first choice", "", f"{found.top1_agreement:.1%}"),
        ("size", size(found.bytes_before), size(found.bytes)),
    )
    for name, before, after in rows:
        typer.echo(f"{name:<18}{before:>12}{after:>18}")
    typer.echo(f"on {found.tokens:,} tokens that calibration has not seen", err=True)
    if found.foreign:
        note(
            "note: this text is foreign to the model, which says it worse than by guessing (a "
            f"perplexity of {found.vocab_size:,}); KL and first choices still compare the two. "
            "Better: --calibration with a file of what it knows, of a chat model conversations "
            "with the tokens that its template writes"
        )
