"""A question in the terminal, and what to do about a model that is not on this machine."""

import sys
from pathlib import Path

from kvrun.errors import BadCheckpoint, KvrunError, NotFound


def ask(question: str) -> bool:
    """Whether the answer begins with y; asked on stderr, because stdout is data."""
    from kvrun.chat.printable import printable

    print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        print(file=sys.stderr)
    return answer.strip().casefold() in ("y", "yes")


def find_model(name: str, *, yes: bool, may_ask: bool = True) -> Path:
    """The folder of a model; one of the Hub that is missing is pulled, after asking or by `yes`.

    Raises what hub.local.resolve raises when nobody wants it, and what a pull raises.
    """
    from kvrun.hub.local import is_pullable, resolve

    try:
        return resolve(name)
    except (NotFound, BadCheckpoint) as error:
        if not is_pullable(name) or not (yes or (may_ask and _wanted(name, error))):
            raise
    from kvrun.cli._transfer import pull
    from kvrun.folder import load

    pull(name, load("kvrun.hub", "remote").look(name))
    return resolve(name)


def _wanted(name: str, error: KvrunError) -> bool:
    """Whether a person at a terminal says so."""
    from kvrun.chat.plain import is_terminal
    from kvrun.hub.known import suggest

    if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
        return False
    alike = suggest(name)
    doubt = f" (did you mean '{alike}'?)" if alike else ""
    return ask(f"{error.what.removesuffix('.')}{doubt}. Pull it?")
