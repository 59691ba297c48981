"""One place where every failure of a command becomes a message and an exit code."""

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

import typer

from kvrun.chat.printable import printable
from kvrun.errors import KvrunError

INTERRUPTED = 130
BROKEN_PIPE = 141

Params = ParamSpec("Params")
Result = TypeVar("Result")


def guarded(command: Callable[Params, Result]) -> Callable[Params, Result]:
    """`command`, whose exceptions end in three lines on stderr and a documented exit code.

    Tracebacks are for KVRUN_DEBUG=1.
    """

    @functools.wraps(command)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.TyperException):
            raise
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BrokenPipeError:
            code = BROKEN_PIPE
        except KvrunError as error:
            code = error.exit_code
            _report(str(error))
        except Exception as error:  # the outermost border: a user sees a message, not a traceback
            code = 1
            _report(_unexpected(error))
        raise typer.Exit(code)

    return run


def usage_error(error: typer.TyperException) -> int:
    """Report words that are no command line; returns the exit code."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "kvrun"
    # Of several variables for one option it would show how Python writes a list.
    message = re.sub(r"'\[(.*?)\]'", r"\1", error.format_message())
    _report(f"{message}\nhint: {command} --help")
    return error.exit_code


def _unexpected(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    kind = type(error).__name__
    return f"{kind}: {error}\nhint: KVRUN_DEBUG=1 shows where it happened; please report it"


def _report(message: str) -> None:
    if sys.stderr is None:
        return
    with suppress(OSError, ValueError):
        if os.environ.get("KVRUN_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {printable(message)}", file=sys.stderr, flush=True)
