"""The options that commands share, as types: a flag, its help, its group, its completion."""

import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvrun.errors import InvalidRequest
from kvrun.runtime.config import DEVICES, DTYPES, QUANTIZE
from kvrun.runtime.sampling.params import SamplingParams, find, parse_option

SAMPLING = "Sampling (default: what the model's generation_config.json names, else temperature 0.7)"
ENGINE = "Engine"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _sampling(name: str, *flags: str) -> Any:
    option = find(name)
    bounds = f" ({option.bounds})" if option.bounds and option.bounds.high <= 100 else ""
    flag = "--" + name.replace("_", "-")
    help = option.help[0].upper() + option.help[1:] + bounds + "."
    metavar = "N" if option.type == "int" else "X"
    return typer.Option(flag, *flags, metavar=metavar, help=help, rich_help_panel=SAMPLING)


def _engine(flag: str, metavar: str, help: str, *, among: tuple[str, ...] = ()) -> Any:
    envvar = "KVRUN_" + flag.strip("-").replace("-", "_").upper()
    complete: Callable[[], list[str]] | None = (lambda: list(among)) if among else None
    return typer.Option(
        flag,
        metavar=metavar,
        help=help,
        envvar=envvar,
        show_envvar=True,
        rich_help_panel=ENGINE,
        autocompletion=complete,
    )


def complete_model(incomplete: str) -> list[str]:
    """Names for shell completion: the built-in models and those in the Hugging Face cache."""
    from kvrun.hub.local import builtin_names, cached_names

    return [n for n in [*builtin_names(), *cached_names()] if n.startswith(incomplete)]


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Names or paths only.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Lines instead of bars.")]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Do not ask: pull a model that is not here.")
]
Temperature = Annotated[float | None, _sampling("temperature", "-t")]
TopP = Annotated[float | None, _sampling("top_p")]
TopK = Annotated[int | None, _sampling("top_k")]
MinP = Annotated[float | None, _sampling("min_p")]
RepetitionPenalty = Annotated[float | None, _sampling("repetition_penalty")]
Seed = Annotated[int | None, _sampling("seed")]
MaxTokens = Annotated[int | None, _sampling("max_tokens")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="End before this text (repeatable).",
        rich_help_panel=SAMPLING,
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="Any sampling option by name (repeatable): "
        + ", ".join(option.name for option in SamplingParams.options())
        + ".",
        rich_help_panel=SAMPLING,
    ),
]
Device = Annotated[str, _engine("--device", "NAME", "auto, cpu, cuda or cuda:N.", among=DEVICES)]
Dtype = Annotated[str, _engine("--dtype", "NAME", f"{', '.join(DTYPES)}.", among=DTYPES)]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME[=PATH]",
        help="A LoRA adapter: one of the model's own by name, or a PEFT folder (repeatable; the "
        "first answers).",
        rich_help_panel=ENGINE,
    ),
]
Quantize = Annotated[
    str | None,
    _engine(
        "--quantize",
        "NAME",
        f"Round the matrices as they are read: {', '.join(QUANTIZE)}. Models that are quantized "
        "already need nothing.",
        among=QUANTIZE,
    ),
]
MaxModelLen = Annotated[
    int | None,
    _engine("--max-model-len", "N", "Most tokens of a prompt with its answer; default: what fits."),
]
KvMemory = Annotated[
    str | None,
    _engine(
        "--kv-memory",
        "SIZE",
        "Memory for keys and values: 512M, 2GiB, or a share like 0.5 or 50% of what is free.",
    ),
]
NoFallback = Annotated[
    bool,
    typer.Option(
        "--no-fallback",
        help="Refuse an architecture that only transformers' own code can run.",
        envvar="KVRUN_NO_FALLBACK",
        show_envvar=True,
        rich_help_panel=ENGINE,
    ),
]
Threads = Annotated[
    int | None,
    _engine(
        "--threads", "N", "CPU threads; default: as many as each step gains by, up to every core."
    ),
]


def chosen(assignments: list[str] | None, **flags: Any) -> dict[str, Any]:
    """The sampling options that were given; a flag goes before -o of the same name.

    Raises InvalidRequest for unknown names and values that cannot be read.
    """
    values = dict(parse_option(text) for text in assignments or ())
    values = {find(name).name: value for name, value in values.items()}
    return values | {name: value for name, value in flags.items() if value not in (None, [])}


def adapters(model: str, given: list[str] | None) -> tuple[dict[str, str], str | None]:
    """What to load for --adapter NAME[=PATH] ..., with the model's own, by name; and the first.

    Raises NotFound for one that is not there.
    """
    from kvrun.hub.local import adapters_of, resolve_adapter

    known, first = adapters_of(model), None
    for text in given or ():
        name, _, path = text.rpartition("=")
        folder = resolve_adapter(model, path)
        name = name or (path if path in known else folder.name)
        known[name] = str(folder)
        first = first or name
    return known, first


def memory(text: str | None) -> int | float | None:
    """Bytes (int) or a share (float in (0, 1]) from what --kv-memory was given."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[kmgt]?i?b?)\s*", text.lower())
    if not match:
        raise InvalidRequest(
            f"--kv-memory is '{text}'.", hint="write 512M, 2GiB, 0.5 or 50%; a share is of 1"
        )
    number, unit = float(match[1]), match[2].removesuffix("b")
    if unit == "%":
        number /= 100
    share = unit == "%" or (not match[2] and number <= 1)
    if share and not 0 < number <= 1:
        raise InvalidRequest(f"--kv-memory is '{text}'; a share is above 0 and at most 1.")
    if share:
        return number
    if unit not in UNITS | BINARY:
        raise InvalidRequest(f"--kv-memory is '{text}'; '{match[2]}' is no unit.")
    return int(number * (UNITS | BINARY)[unit])
