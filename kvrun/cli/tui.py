"""kvrun tui: ask several adapters at once, side by side."""

import os
import secrets
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrun.cli import _options as options
from kvrun.errors import InvalidRequest

if TYPE_CHECKING:
    from kvrun.chat.session import Session
    from kvrun.runtime.text import Text
    from kvrun.tui.board import Board

PANEL = "Chat"
COLUMNS = "Columns"
EXAMPLES = (
    "kvrun tui                                the built-in model and its three adapters",
    "kvrun tui --demo                         the same, asking by itself",
    "kvrun tui Qwen/Qwen3-0.6B                a model of the Hugging Face cache",
    "kvrun tui ./model --adapter law=./lora   a model, and an adapter of yours beside it",
    "kvrun tui --url http://127.0.0.1:3000    a server's models instead of an engine here",
)

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a built-in model or ORG/NAME[@REV]. Default: $KVRUN_MODEL, else tiny.",
        autocompletion=options.complete_model,
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Ask an OpenAI-compatible server; a column for each of its models, four at most.",
        rich_help_panel=COLUMNS,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        metavar="KEY",
        help="The server's key.",
        envvar="KVRUN_API_KEY",
        show_envvar=True,
        rich_help_panel=COLUMNS,
    ),
]
System = Annotated[
    str, typer.Option("--system", "-s", metavar="TEXT", help="The system prompt of all columns.")
]
Demo = Annotated[bool, typer.Option("--demo", help="Ask by itself until a key is pressed.")]
Resume = Annotated[
    bool, typer.Option("--continue", "-c", help="Go on with the latest conversations.")
]
NoSave = Annotated[bool, typer.Option("--no-save", help="Keep no conversation.")]


def command(
    model: Model = None,
    adapter: options.Adapter = None,
    url: Url = None,
    api_key: ApiKey = None,
    system: System = "",
    demo: Demo = False,
    resume: Resume = False,
    no_save: NoSave = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = None,
    option: options.Assignments = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KvMemory = None,
    threads: options.Threads = None,
    no_fallback: options.NoFallback = False,
    yes: options.Yes = False,
) -> None:
    """Ask a model and its adapters side by side, answered from one batch."""
    sampling = options.chosen(
        option,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_tokens=max_tokens,
    )
    check_terminal()
    engine = {
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "max_model_len": max_model_len,
        "kv_memory": options.memory(kv_memory),
        "threads": threads,
        "fallback": not no_fallback,
    }
    save = not no_save
    if url is not None:
        board = _server_board(url, api_key, sampling, system, save=save)
    else:
        name = model or os.environ.get("KVRUN_MODEL") or "tiny"
        board = local_board(name, adapter, sampling, engine, system=system, save=save, yes=yes)
    open_board(board, demo=demo, resume=resume)


def check_terminal() -> None:
    """Raise InvalidRequest where no screen can be shown."""
    from kvrun.chat.plain import is_terminal

    if not is_terminal(sys.stdin) or not is_terminal(sys.stdout):
        raise InvalidRequest("kvrun tui needs a terminal.", hint="kvrun chat works without one")
    if os.environ.get("TERM", "dumb" if os.name == "posix" else "") == "dumb":
        raise InvalidRequest("TERM=dumb cannot show it.", hint="kvrun chat --plain")


def local_board(
    name: str,
    adapters: list[str] | None,
    sampling: dict[str, Any],
    engine: dict[str, Any],
    *,
    system: str = "",
    save: bool = True,
    yes: bool = False,
) -> "Board":
    """Columns for the base and each adapter, on an engine that begins to start at once."""
    from kvrun.chat.session import Session
    from kvrun.chat.settings import Settings
    from kvrun.cli._ask import find_model
    from kvrun.hub.local import adapters_of, resolve
    from kvrun.runtime.config import EngineConfig
    from kvrun.runtime.engine.client import EngineClient

    Settings(sampling)  # what is out of bounds is refused before anything starts
    wanted, _ = options.adapters(name, adapters)
    named = [options.adapters(name, [text])[1] or "" for text in adapters or ()]

    def connect(other: str) -> Session:
        found = wanted if other == name else adapters_of(other)
        # A question can be asked before the screen is there, and not on it.
        folder = str(find_model(other, yes=yes) if other == name else resolve(other))
        config = EngineConfig(model=folder, seed=secrets.randbits(63), **engine, adapters=found)
        return Session(other, config, open_text=_open_text, connect=EngineClient)

    return _board(connect(name), connect, named or list(wanted), sampling, system, save)


def _board(
    session: "Session",
    connect: "Callable[[str], Session]",
    adapters: list[str],
    sampling: dict[str, Any],
    system: str,
    save: bool,
) -> "Board":
    from kvrun.chat.store import Store
    from kvrun.tui.board import Board
    from kvrun.tui.host import Host
    from kvrun.tui.talk import Speaker

    host = Host(session, connect)
    board = Board(host, Store() if save else None, chosen=sampling, system=system)
    board.add(Speaker())
    for name in adapters:
        board.add(Speaker(name))
    return board


def open_board(board: "Board", *, demo: bool = False, resume: bool = False) -> None:
    """Show it until the user leaves."""
    from kvrun.tui.start import show

    show(board, demo=demo, resume=resume)


def _server_board(
    url: str, api_key: str | None, sampling: dict[str, Any], system: str, *, save: bool
) -> "Board":
    import asyncio

    from kvrun.chat.plain import note
    from kvrun.chat.remote import PATIENCE, Remote
    from kvrun.chat.store import Store
    from kvrun.tui.board import Board
    from kvrun.tui.talk import Speaker

    remote = Remote(url, api_key=api_key)

    def waiting(said: str) -> None:
        note(f"waiting for {remote.address}, {PATIENCE} s at most: {said}")

    names = asyncio.run(remote.models(waiting))
    if not names:
        raise InvalidRequest(f"{remote.address} lists no model.")
    board = Board(None, Store() if save else None, chosen=sampling, system=system)
    for name in names[:4]:
        board.add(Speaker(name), source=Remote(url, name, api_key=api_key))
    return board


def _open_text(folder: str) -> "Text | None":
    from kvrun.runtime.text import Text

    return Text.open(folder)
