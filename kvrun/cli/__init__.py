"""JOB: words on a command line -> one call; one file per command, found by the folder."""

import os
import sys
from types import ModuleType
from typing import Annotated, Any

import typer

from kvrun import __version__
from kvrun.cli._guard import INTERRUPTED, guarded, usage_error
from kvrun.cli._help import Command, Group, paragraphs
from kvrun.folder import load, names

EPILOG = """\
Exit codes: 0 ok · 1 expected failure · 2 wrong usage or value · 3 not found · 4 does not fit or \
is not supported · 5 network or offline · 70 the engine died · 130 Ctrl+C · 141 closed pipe

Environment: KVRUN_DEBUG=1 shows tracebacks. HF_HOME and HF_HUB_CACHE say where models lie, \
HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE how they are fetched. \
NO_COLOR and TERM=dumb are honoured.\
"""

COMPLETION = "_KVRUN_COMPLETE"  # set by the shell while it asks for completions
_SETTINGS: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code; `arguments` default to those of the process."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        # Printing a help may fail too; what a command raises has become an Exit inside.
        code = guarded(_run)(words)
    except typer.TyperException as error:
        code = usage_error(error)
    except typer.Exit as end:
        code = end.exit_code
    except typer.Abort:
        code = INTERRUPTED
    sys.exit(code)


def _run(words: list[str]) -> int:
    if words[:1] and words[0] in names("kvrun.cli") and COMPLETION not in os.environ:
        name, app, words = _one(words[0], words[1:])
    else:
        name, app = "kvrun", _all()
    code = app(args=words, prog_name=name, standalone_mode=False)
    return code if isinstance(code, int) else 0


def _one(name: str, words: list[str]) -> tuple[str, typer.Typer, list[str]]:
    """A single command, its full name, and the words that are left for it.

    Nothing of the others is imported, nor what only their options need.
    """
    module = load("kvrun.cli", name)
    full, app = f"kvrun {name}", typer.Typer(add_completion=False, **_SETTINGS)
    commands = getattr(module, "COMMANDS", None)
    if commands is None:
        _add(app, name, module)
        return full, app, words
    if words and words[0] in commands:
        _add_one_of(app, name, module, words[0])
        return f"{full} {words[0]}", app, words[1:]
    return full, _group(name, module), words or ["--help"]


def _all() -> typer.Typer:
    """Every command, for the help, for completion, and for words that are no command."""
    app = typer.Typer(
        cls=Group,
        help="Run language models on your own machine.",
        epilog=EPILOG,
        invoke_without_command=True,
        **_SETTINGS,
    )
    app.callback()(_kvrun)
    for name in names("kvrun.cli"):
        module = load("kvrun.cli", name)
        if hasattr(module, "COMMANDS"):
            app.add_typer(_group(name, module), name=name, rich_help_panel=module.PANEL)
        else:
            _add(app, name, module)
    return app


def _group(name: str, module: ModuleType) -> typer.Typer:
    """A command with commands of its own, each with those of the examples that show it."""
    app = typer.Typer(
        cls=Group,
        help=module.HELP,
        epilog=paragraphs("Examples:", module.EXAMPLES),
        add_completion=False,
        **_SETTINGS,
    )
    app.callback()(_nothing)
    for word in module.COMMANDS:
        _add_one_of(app, name, module, word)
    return app


def _nothing() -> None:
    """A group has no options of its own."""


def _add_one_of(app: typer.Typer, name: str, module: ModuleType, word: str) -> None:
    examples = [line for line in module.EXAMPLES if line.startswith(f"kvrun {name} {word} ")]
    app.command(
        word, cls=Command, epilog=paragraphs("Examples:", examples), rich_help_panel="Commands"
    )(guarded(module.COMMANDS[word]))


def _add(app: typer.Typer, name: str, module: ModuleType) -> None:
    app.command(
        name,
        cls=Command,
        epilog=paragraphs("Examples:", module.EXAMPLES),
        rich_help_panel=module.PANEL,
    )(guarded(module.command))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvrun {__version__}")
        raise typer.Exit


def _kvrun(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of kvrun itself; without a command, the help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
