"""The options that the commands of `kvrun bench` share."""

import os
from typing import Annotated, Any

import typer

from kvrun.cli import _options as options
from kvrun.cli._ask import find_model
from kvrun.errors import InvalidRequest

OUTPUT = "Output"
MODEL = "Model"
WORK = "Measurement"
SERVER = "Server"
FORMATS = ("table", "md", "csv", "json", "jsonl")


# Bounds are checked here and not by typer, which would import another package for it.
def work(*flags: str, metavar: str, help: str, **more: Any) -> Any:
    """An option that says what is measured."""
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=WORK, **more)


def output(*flags: str, help: str, **more: Any) -> Any:
    """An option that says how the figures come out."""
    return typer.Option(*flags, help=help, rich_help_panel=OUTPUT, **more)


def flag(*names: str, help: str, panel: str = WORK) -> Any:
    """A switch."""
    return typer.Option(*names, help=help, rich_help_panel=panel)


def check(least: int = 1, **values: int | None) -> None:
    """Raise InvalidRequest for a number below `least`; the option's name is the keyword's."""
    for name, value in values.items():
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise InvalidRequest(f"{flag} is {value}; it must be at least {least}.")


def model_name(model: str | None, shape: str | None, yes: bool) -> str | None:
    """The model asked for, by the environment where neither it nor a shape is named.

    It is pulled, by `yes` or after asking, when it is not on this machine.
    """
    name = model or (None if shape else os.environ.get("KVRUN_MODEL") or None)
    if name and not shape:
        find_model(name, yes=yes)
    return name


ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a built-in model or ORG/NAME[@REV]; without weights beside its "
        "config.json they are random. Default: $KVRUN_MODEL, else tiny.",
        autocompletion=options.complete_model,
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="NAME",
        help="Instead of MODEL: random weights in the shape of llama-3-8b, llama-3.2-1b, "
        "qwen3-0.6b, smollm2-135m, gemma-2-2b or mixtral-8-layers; nothing is downloaded.",
        rich_help_panel=MODEL,
    ),
]
Random = Annotated[
    bool,
    typer.Option("--random", help="Random weights although there are others.",
                 rich_help_panel=MODEL),
]  # fmt: skip
Engine = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        "-e",
        metavar="NAME=VALUE",
        help="Any argument of kvrun.LLM (repeatable): -e max_num_seqs=512 -e cuda_graphs=false. "
        "The prefix cache is off unless asked for.",
        rich_help_panel=options.ENGINE,
    ),
]
Repetitions = Annotated[
    int, work("--repetitions", "-r", metavar="N", help="How often each is measured.")
]
Seed = Annotated[int, work("--seed", metavar="N", help="Of the prompts' token ids.")]
Format = Annotated[
    str,
    output(
        "--output", "-o", metavar="FORMAT", help=f"{', '.join(FORMATS)}.",
        autocompletion=lambda: list(FORMATS),
    ),
]  # fmt: skip
Plot = Annotated[str | None, output("--plot", metavar="FILE", help="Write a chart there, as SVG.")]
Chart = Annotated[
    bool | None,
    output(
        "--chart/--no-chart", help="Bars below the table. Default: in a terminal.",
        show_default=False,
    ),
]  # fmt: skip
NoProgress = Annotated[bool, output("--no-progress", help="No line that says what is measured.")]
NoRoofline = Annotated[
    bool, flag("--no-roofline", help="Measure no ceilings of this machine, show no limits.")
]
Requests = Annotated[
    int | None,
    work(
        "--requests", "-n", metavar="N",
        help="How many; default: what the workload has, 256 of INPUT/OUTPUT.",
    ),
]  # fmt: skip
OutputLen = Annotated[
    int,
    work(
        "--output-len", metavar="N",
        help="Tokens of an answer, for lines of a file that do not say it.",
    ),
]  # fmt: skip
WORKLOADS = (
    "INPUT/OUTPUT tokens as in 128/128, mixed256, mixed1000, prefill8x8192, ttft512, or a .jsonl "
    "file of prompts"
)
Workload = Annotated[str, work("--workload", "-w", metavar="NAME", help=f"{WORKLOADS}.")]
Workloads = Annotated[
    list[str] | None,
    work("--workload", "-w", metavar="NAME", help=f"{WORKLOADS} (repeatable). Default: 128/128."),
]
Batches = Annotated[str, work("-b", metavar="LIST", help="Sequences at once: 1,8 or 1-64*2.")]
Popularity = Annotated[
    str,
    work(
        "--popularity", metavar="LIST",
        help="Which request has which adapter: identical, skewed, uniform, distinct.",
    ),
]  # fmt: skip
AdapterCount = Annotated[
    int | None, work("--adapters", metavar="N", help="How many; default: the largest batch.")
]
Rank = Annotated[int, work("--rank", metavar="N", help="Of every adapter.")]
Targets = Annotated[
    str, work("--targets", metavar="LIST", help="As q_proj,v_proj; default: every one.")
]
InsteadOfSteps = Annotated[
    list[str] | None,
    work(
        "--workload", "-w", metavar="NAME",
        help="Instead of steps: many requests at once, as in `throughput` (repeatable).",
    ),
]  # fmt: skip
Url = Annotated[
    str,
    typer.Argument(
        metavar="URL",
        help="Of the server, or of its /v1/completions or /v1/chat/completions.",
        show_default=False,
    ),
]
ServedModel = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="NAME", rich_help_panel=SERVER,
        help="As the server calls it; default: the first that it lists.",
    ),
]  # fmt: skip
Api = Annotated[
    str | None,
    typer.Option(
        "--api", metavar="NAME", rich_help_panel=SERVER,
        help="completions (default) or chat.",
    ),
]  # fmt: skip
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key", metavar="KEY", rich_help_panel=SERVER,
        help="Sent as a bearer token; default: $KVRUN_API_KEY, $OPENAI_API_KEY.",
        envvar="KVRUN_API_KEY", show_envvar=False,
    ),
]  # fmt: skip
Concurrency = Annotated[
    int | None,
    work(
        "--concurrency", "-c", metavar="N",
        help="Clients that each ask again once they have an answer (default: 8).",
    ),
]  # fmt: skip
Rate = Annotated[
    float | None,
    work(
        "--rate", metavar="X",
        help="Instead: so many requests a second, at times of a Poisson process; inf: at once.",
    ),
]  # fmt: skip
Text = Annotated[
    bool, flag("--text", help="Prompts as words instead of token ids; in chats always.")
]
Vocab = Annotated[
    int | None,
    work("--vocab", metavar="N", help="Token ids below N, for small vocabularies."),
]
NoIgnoreEos = Annotated[
    bool, flag("--no-ignore-eos", help="Answers may end early; nothing is sent but OpenAI's own.")
]
Slo = Annotated[
    str,
    work("--slo", metavar="BOUNDS", help="What a good request keeps: ttft=200ms,tpot=50ms,e2e=9s."),
]
Timeout = Annotated[float, work("--timeout", metavar="SECONDS", help="For one request.")]
