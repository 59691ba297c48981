"""Slash commands as data: a name, its arguments, its help and a function; no screen."""

import difflib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from kvrun.chat.conversation import Conversation
from kvrun.chat.lines import QUOTES, unquoted
from kvrun.chat.session import Reply, Session
from kvrun.chat.settings import Setting, Settings
from kvrun.chat.store import Store
from kvrun.errors import InvalidRequest, NotFound
from kvrun.hub.local import resolve_adapter
from kvrun.runtime.engine.request import AdapterInfo
from kvrun.runtime.plan import size

USAGE = 22  # cells that a command with its arguments has in a list


@dataclass
class Chat:
    """What a command works on."""

    session: Session
    settings: Settings
    store: Store
    conversation: Conversation
    saved_as: str | None = None
    last: Reply | None = None


@dataclass(frozen=True)
class Effect:
    """What a command wants from the screen: say something, then perhaps one thing more."""

    say: str = ""
    ask: bool = False  # have the last question answered
    replay: bool = False  # show the conversation from its start
    wipe: bool = False  # begin with an empty screen
    leave: bool = False


@dataclass(frozen=True)
class Command:
    """`run(chat, argument)` raises KvrunError for what a user can do wrong."""

    name: str
    args: str
    help: str
    run: Callable[[Chat, str], Awaitable[Effect]]
    aliases: tuple[str, ...] = ()


def find(word: str) -> Command:
    """The command a word names. Raises NotFound with the nearest name."""
    name = word.removeprefix("/").lower()
    for command in COMMANDS:
        if name == command.name or name in command.aliases:
            return command
    names = [n for c in COMMANDS for n in (c.name, *c.aliases)]
    near = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean /{near[0]}?" if near else "/help lists the commands"
    raise NotFound(f"there is no command /{name}.", hint=hint + "; // at the start sends a slash")


async def run(chat: Chat, text: str) -> Effect:
    """Carry out a line that `is_command`."""
    word, _, argument = text.strip().partition(" ")
    return await find(word).run(chat, argument.strip())


async def _help(chat: Chat, argument: str) -> Effect:
    if argument:
        command = find(argument)
        also = f"\nalso: {', '.join('/' + a for a in command.aliases)}" if command.aliases else ""
        return Effect(f"/{command.name} {command.args}".rstrip() + f"\n{command.help}{also}")
    keys = f"{QUOTES} begins and ends a block of several lines; // at the start sends a slash"
    return Effect("\n".join([*overview(), keys]))


def overview() -> list[str]:
    """Every command in lines of at most 80 cells; a long one stands above its help."""
    lines = []
    for command in COMMANDS:
        usage = f"/{command.name} {command.args}".rstrip()
        if len(usage) >= USAGE:
            lines.append(usage)
            usage = ""
        lines.append(usage.ljust(USAGE) + command.help)
    return lines


async def _system(chat: Chat, argument: str) -> Effect:
    if not argument:
        now = chat.conversation.system
        return Effect(f"system prompt: {now}" if now else "no system prompt is set")
    if argument in ('""', "''", "none"):
        chat.conversation.system = ""
        return Effect("the system prompt is gone")
    if not chat.session.text.chat_template_known:
        raise InvalidRequest(
            f"'{chat.session.name}' takes no system prompt.",
            cause="the model has no chat template; it only continues a text",
        )
    chat.conversation.system = unquoted(argument)
    return Effect("the system prompt is set, from the next answer on")


async def _set(chat: Chat, argument: str) -> Effect:
    if not argument:
        return Effect("\n".join(_row(setting) for setting in chat.settings.all()))
    name, value = _split(argument)
    if not value:
        name = name.replace("-", "_")
        found = [s for s in chat.settings.all() if s.name == name]
        if found:
            return Effect(f"{_row(found[0])}\n{found[0].help}")
    return Effect(_row(chat.settings.set(name, value)))


def _split(argument: str) -> tuple[str, str]:
    """The name and value of "temperature=0.7" or "temperature 0.7"."""
    name = argument.split("=")[0].split()[0] if argument.split("=")[0].strip() else ""
    return name, argument[argument.find(name) + len(name) :].lstrip().removeprefix("=").strip()


def _row(setting: Setting) -> str:
    value = setting.value
    if value is None or value in ((), {}):
        shown = "none"
    else:
        shown = ", ".join(map(repr, value)) if isinstance(value, tuple) else str(value)
    return f"{setting.name:<20} {shown:<12} ({setting.origin})"


async def _regen(chat: Chat, argument: str) -> Effect:
    chat.conversation.again()
    return Effect(ask=True)


async def _stats(chat: Chat, argument: str) -> Effect:
    ready, now = chat.session.engine, await chat.session.stats()
    lines = [stats_line(chat.last)] if chat.last else []
    lines += [
        f"model {chat.session.name}, {ready.dtype} on {ready.device}, {ready.attention} attention,"
        f" context {chat.session.context:,} tokens",
        f"{ready.plan}; {chat.session.start_line()}",
        f"since then {now.steps:,} steps, {now.prompt_tokens:,} prompt tokens "
        f"({now.prefix_hit_tokens:,} from the prefix cache), {now.generated_tokens:,} generated",
    ]
    return Effect("\n".join(lines))


def stats_line(reply: Reply) -> str:
    """One line on a reply for people: speed, time to the first token, counts."""
    timing = reply.timing
    speed = [f"{timing.rate:.1f} tokens/s"] if timing.rate else []
    if timing.first_token is not None:
        speed.append(f"first token after {timing.first_token:.3f} s")
    cached = f" ({reply.cached_tokens} cached)" if reply.cached_tokens else ""
    counts = [f"{reply.tokens} tokens", f"prompt {reply.prompt_tokens}{cached}"]
    return ", ".join([*speed, *counts, f"ended by {reply.finish_reason}"])


async def _adapter(chat: Chat, argument: str) -> Effect:
    verb, _, rest = argument.partition(" ")
    name, _, path = rest.strip().partition(" ")
    session = chat.session
    if verb in ("", "list") and not name:
        return Effect(_adapter_rows(await session.adapters(), session.adapter))
    if verb not in ("load", "use", "unload") or not name or (path and verb != "load"):
        raise InvalidRequest("that is not what /adapter takes.", hint=f"/adapter {ADAPTER_ARGS}")
    if verb == "load":
        folder = resolve_adapter(session.name, path.strip() or name)
        info = await session.load_adapter(name if path else folder.name, str(folder))
        session.adapter = info.name
        return Effect(f"'{info.name}' is loaded ({size(info.bytes)}) and answers from now on")
    if verb == "unload":
        await session.unload_adapter(name)
        return Effect(f"'{name}' is unloaded")
    if name in ("none", "base"):
        session.adapter = None
        return Effect("the base model answers from now on")
    known = [info.name for info in await session.adapters()]
    if name not in known:
        hint = f"known: {', '.join(known)}" if known else "/adapter load NAME FOLDER"
        raise NotFound(f"there is no adapter '{name}'.", hint=hint)
    session.adapter = name
    return Effect(f"'{name}' answers from now on")


def _adapter_rows(infos: list[AdapterInfo], used: str | None) -> str:
    rows = [
        f"{'*' if info.name == used else ' '} {info.name:<16} rank "
        f"{', '.join(map(str, info.ranks)):<8} {size(info.bytes):>8}  {info.error or info.path}"
        for info in infos
    ]
    return "\n".join(rows) or "no adapter is loaded; /adapter load NAME FOLDER"


async def _save(chat: Chat, argument: str) -> Effect:
    name = argument or chat.saved_as
    if not name:
        raise InvalidRequest("the conversation has no name yet.", hint="/save NAME")
    chat.store.save(name, chat.conversation, chat.session.name)
    chat.saved_as = name
    return Effect(f"saved as '{name}' ({len(chat.conversation)} messages)")


async def _load(chat: Chat, argument: str) -> Effect:
    if not argument:
        rows = [f"{s.name:<24} {s.messages:>4} messages  {s.updated}" for s in chat.store.saved()]
        return Effect("\n".join(rows) or "no conversation is saved yet; /save NAME keeps this one")
    chat.conversation = chat.store.load(argument)
    chat.saved_as, chat.last = argument, None
    return Effect(f"loaded '{argument}'", replay=True)


async def _clear(chat: Chat, argument: str) -> Effect:
    chat.conversation = Conversation(chat.conversation.system)
    chat.saved_as = chat.last = None
    return Effect("a new conversation begins", wipe=True)


async def _quit(chat: Chat, argument: str) -> Effect:
    return Effect(leave=True)


ADAPTER_ARGS = "[load NAME [FOLDER] | use NAME|none | unload NAME]"
COMMANDS = (
    Command("help", "[COMMAND]", "what can be typed here", _help, ("?", "h")),
    Command("system", "[TEXT]", 'show or set the system prompt; "" takes it away', _system),
    Command("set", "[NAME [VALUE]]", "show or set a sampling option; `default` resets", _set),
    Command(
        "adapter", ADAPTER_ARGS, "LoRA adapters: which there are, and which one answers", _adapter
    ),
    Command("regen", "", "answer the last question again", _regen, ("retry",)),
    Command("stats", "", "speed of the last answer, and the engine's counters", _stats),
    Command("save", "[NAME]", "keep the conversation under a name", _save),
    Command("load", "[NAME]", "go on with a saved conversation; alone: list them", _load),
    Command("clear", "", "begin a new conversation; system prompt and options stay", _clear),
    Command("quit", "", "leave", _quit, ("bye", "exit", "q")),
)
