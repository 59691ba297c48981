"""kvrun chat: a question and its answer, or a conversation."""

import os
import secrets
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvrun.cli import _options as options
from kvrun.cli._stdin import read_stdin
from kvrun.cli.tui import check_terminal, local_board, open_board
from kvrun.errors import InvalidRequest, KvrunError

if TYPE_CHECKING:
    from kvrun.chat.repl import Reader, Screen
    from kvrun.chat.session import Session
    from kvrun.chat.settings import Settings
    from kvrun.runtime.text import Text

PANEL = "Chat"
EXAMPLES = (
    'kvrun chat "What is 12 + 30?"                    an answer from the built-in model',
    "kvrun chat                                       a conversation",
    'cat notes.txt | kvrun chat "Sum this up" > out   the file, then the question',
    "kvrun chat Qwen/Qwen3-0.6B -t 0 --stats          a model of the Hub, pulled after asking",
    'kvrun chat --adapter sql "Show all users."       one of the LoRA adapters of tiny',
    'kvrun chat --json -t 1 -o n=3 "Tell me a story"  three answers in one JSON object',
)

ModelOrPrompt = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder, a built-in model or ORG/NAME[@REV]; anything else is the PROMPT. "
        "Default: $KVRUN_MODEL, else tiny.",
        autocompletion=options.complete_model,
    ),
]
Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="The question; - is stdin. What is piped in stands before it. "
        "Without any, a conversation begins.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="The model; the only other argument is the PROMPT then.",
        rich_help_panel=PANEL,
        autocompletion=options.complete_model,
    ),
]
System = Annotated[
    str,
    typer.Option(
        "--system", "-s", metavar="TEXT", help="The system prompt.", rich_help_panel=PANEL
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="One JSON object: text, counts, times, all choices.",
        rich_help_panel=PANEL,
    ),
]
Image = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="Show the model a PNG or JPEG file (repeatable); a ./path in the PROMPT does too.",
        rich_help_panel=PANEL,
    ),
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain",
        help="No Markdown, colours or line editor (as with TERM=dumb).",
        rich_help_panel=PANEL,
    ),
]
Tui = Annotated[
    bool,
    typer.Option(
        "--tui",
        help="Columns side by side, as with two or more --adapter in a terminal.",
        rich_help_panel=PANEL,
    ),
]
Stats = Annotated[
    bool,
    typer.Option(
        "--stats",
        help="Print tokens/s and time to first token to stderr.",
        rich_help_panel=PANEL,
    ),
]


def command(
    model_or_prompt: ModelOrPrompt = None,
    prompt: Prompt = None,
    model: Model = None,
    system: System = "",
    image: Image = None,
    as_json: Json = False,
    plain: Plain = False,
    tui: Tui = False,
    stats: Stats = False,
    yes: options.Yes = False,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    max_tokens: options.MaxTokens = None,
    stop: options.Stop = None,
    option: options.Assignments = None,
    adapter: options.Adapter = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KvMemory = None,
    threads: options.Threads = None,
    no_fallback: options.NoFallback = False,
) -> None:
    """Talk to a model: one answer to a PROMPT or to piped text, else a conversation."""
    sampling = options.chosen(
        option,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop,
    )
    engine: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "quantize": quantize,
        "max_model_len": max_model_len,
        "kv_memory": options.memory(kv_memory),
        "threads": threads,
        "fallback": not no_fallback,
    }
    name, words = _model_and_prompt(model_or_prompt, prompt, model)
    style = _Style(as_json, plain or _is_dumb(), stats, yes, tuple(image or ()))
    if _beside(words, adapter, style, wanted=tui):
        open_board(local_board(name, adapter, sampling, engine, system=system, yes=yes))
        return
    engine["adapters"], first = options.adapters(name, adapter)
    _chat(name, words, system, sampling, engine, style, first)


def _beside(
    words: str | None, adapters: list[str] | None, style: "_Style", *, wanted: bool
) -> bool:
    """Whether the conversation stands in columns: `kvrun tui` with this command's options."""
    from kvrun.chat.plain import is_terminal

    if wanted:
        if words is not None or style.json or style.plain or style.images:
            raise InvalidRequest("--tui takes no prompt, no image, and no --json or --plain.")
        check_terminal()
        return True
    typed = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    several = len(adapters or ()) > 1
    return several and typed and words is None and not (style.json or style.plain or style.stats)


@dataclass(frozen=True)
class _Style:
    """How to show things; `plain` is without Markdown, colours and line editor."""

    json: bool
    plain: bool
    stats: bool
    yes: bool  # pull without asking
    images: tuple[str, ...] = ()  # files to show the model

    @property
    def color(self) -> bool:
        return not os.environ.get("NO_COLOR") and os.environ.get("CLICOLOR") != "0"


def _chat(
    name: str,
    words: str | None,
    system: str,
    sampling: dict[str, Any],
    engine: dict[str, Any],
    style: _Style,
    adapter: str | None,
) -> None:
    """Check everything that can be checked, start the engine, then load what the screen needs."""
    import asyncio

    from kvrun.chat.session import Session
    from kvrun.chat.settings import Settings
    from kvrun.chat.shown import with_images
    from kvrun.cli._ask import find_model
    from kvrun.runtime.config import EngineConfig
    from kvrun.runtime.engine.client import EngineClient

    settings = Settings(sampling)
    alone = sorted({"n", "logprobs", "prompt_logprobs"} & sampling.keys())
    if alone and not style.json:
        raise InvalidRequest(f"{alone[0]} has no place in plain text.", hint="add --json")
    if sys.stdout is None:
        raise KvrunError("standard output is closed.")
    # A conversation without a seed of its own goes another way each time.
    config = EngineConfig(
        model=str(find_model(name, yes=style.yes)), seed=secrets.randbits(63), **engine
    )
    question = _question(words, style)
    asked = with_images(question, words, list(style.images), config.model)

    async def talk() -> None:
        _cancel_when_terminated()
        made = Session(name, config, open_text=_open_text, connect=EngineClient, adapter=adapter)
        async with made as session:
            if question is None:
                await _converse(session, settings, system, style)
            else:
                await _answer(session, settings, system, asked, style)

    try:
        asyncio.run(talk())
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None


def _cancel_when_terminated() -> None:
    """Leave as Ctrl+D would on SIGTERM: the terminal is put right and the engine is stopped."""
    import asyncio

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    if task:
        cancel = task.cancel
        signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(cancel))


def _open_text(folder: str) -> "Text | None":
    from kvrun.runtime.text import Text

    return Text.open(folder)


async def _answer(
    session: "Session",
    settings: "Settings",
    system: str,
    question: str | list[dict[str, Any]],
    style: _Style,
) -> None:
    from kvrun.chat.once import answer, print_json
    from kvrun.chat.plain import note

    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    screen = None if style.json else _screen(style)
    await _get_ready(session, settings, style)
    if style.stats:
        note(f"{session.engine.plan}; {session.start_line()}")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    reply = await answer(session, messages, settings, screen, stats=style.stats)
    if style.json:
        print_json(session, reply, sys.stdout)


async def _converse(session: "Session", settings: "Settings", system: str, style: _Style) -> None:
    from kvrun.chat.commands import Chat
    from kvrun.chat.conversation import Conversation
    from kvrun.chat.repl import converse
    from kvrun.chat.store import Store

    screen, reader = _screen(style), _reader(style)
    await _get_ready(session, settings, style)
    ready = session.engine
    screen.note(
        f"{_with_adapter(session)} · {ready.dtype} on {ready.device} · {ready.plan}\n"
        "/help lists the commands, Ctrl+D leaves"
    )
    chat = Chat(session, settings, Store(), Conversation(system))
    await converse(chat, reader, screen, stats=style.stats)


def _with_adapter(session: "Session") -> str:
    return session.name + (f" with {session.adapter}" if session.adapter else "")


async def _get_ready(session: "Session", settings: "Settings", style: _Style) -> None:
    from kvrun.chat.plain import Waiting, note

    with Waiting(f"starting {session.name} …", shown=not style.plain):
        await session.ready()
    settings.learn(session.text.generation_defaults)
    if session.engine.note:
        note(f"note: {session.engine.note}")
    if not session.text.chat_template_known:
        note(f"note: '{session.name}' has no chat template; it gets the text as it is")


def _screen(style: _Style) -> "Screen":
    from kvrun.chat.plain import PlainScreen, is_terminal

    if style.plain or not is_terminal(sys.stdout):
        return PlainScreen(sys.stdout, raw=not is_terminal(sys.stdout))
    from kvrun.chat.markdown import MarkdownScreen

    return MarkdownScreen(sys.stdout, color=style.color)


def _reader(style: _Style) -> "Reader":
    if style.plain:
        from kvrun.chat.plain import PlainReader

        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        return PlainReader()
    from kvrun.chat.editor import EditorReader
    from kvrun.chat.store import state_folder

    return EditorReader(state_folder() / "history", color=style.color)


def _is_dumb() -> bool:
    return os.environ.get("TERM", "dumb" if os.name == "posix" else "") == "dumb"


def _model_and_prompt(
    first: str | None, second: str | None, model: str | None
) -> tuple[str, str | None]:
    """Which of the words is the model: one alone only if it names one that can be there."""
    from kvrun.chat.plain import note
    from kvrun.hub.local import is_model_name, near

    default = os.environ.get("KVRUN_MODEL") or "tiny"
    if model is not None:
        if second is not None:
            raise InvalidRequest(
                "there are two arguments beside --model.", hint="put the prompt into one pair of ''"
            )
        return model, first
    if first is None or second is not None:
        return first or default, second
    if is_model_name(first):
        return first, None
    if close := near(first):
        note(f"note: '{first}' is the prompt; for the model '{close[0]}' say -m {close[0]}")
    elif first.startswith(("./", "../", "/", "~/")) and len(first.split()) == 1:
        note(f"note: '{first}' is the prompt; no folder is called so")
    return default, first


def _question(words: str | None, style: _Style) -> str | None:
    """What to ask: the piped text, then the words; None when a conversation shall begin."""
    from kvrun.chat.plain import is_terminal, note

    typing = is_terminal(sys.stdin)
    if words == "-" or (words is None and typing and not is_terminal(sys.stdout)):
        if typing:
            note("type the prompt; Ctrl+D on an empty line ends it")
        piped, words = read_stdin(), None
    elif typing:
        piped = ""
    else:
        piped = read_stdin()
    if words is None and typing and not piped and is_terminal(sys.stdout):
        if style.json:
            raise InvalidRequest("--json needs a prompt.", hint='kvrun chat --json "..."')
        return None
    question = "\n\n".join(part for part in (piped.strip("\n"), words) if part)
    if not question.strip():
        raise InvalidRequest("the prompt is empty.", hint='kvrun chat "What is 12 + 30?"')
    return question
