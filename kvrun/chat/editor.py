"""The line editor of a conversation: several lines, history, completion of commands."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_done
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth

from kvrun.chat.commands import COMMANDS
from kvrun.chat.interrupt import keys_kept
from kvrun.chat.lines import unfinished
from kvrun.chat.plain import note
from kvrun.runtime.sampling.params import SamplingParams

PLACEHOLDER = "ask something, or /help"


class EditorReader:
    """Reads with prompt_toolkit; history lies in `history`, in memory if that cannot be written."""

    def __init__(self, history: Path, *, color: bool = True) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="  ",
            key_bindings=_keys(),
            history=_history(history),
            completer=_Commands(),
            complete_while_typing=True,
            enable_open_in_editor=False,
            color_depth=None if color else ColorDepth.DEPTH_1_BIT,
            reserve_space_for_menu=4,
        )

    async def read(self) -> str:
        """One input. Raises EOFError for Ctrl+D, KeyboardInterrupt for Ctrl+C on an empty line."""
        while True:
            try:
                return await self._session.prompt_async(placeholder=_placeholder)
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    raise
                # Ctrl+C in the middle of a line throws the line away, as in a shell.

    def quiet(self) -> AbstractContextManager[None]:
        """Between two prompts, keys wait for the next one."""
        return keys_kept()


def _placeholder() -> StyleAndTextTuples:
    """Shown while nothing is typed, and not left behind on the screen."""
    return [] if get_app().is_done else [("fg:ansibrightblack", PLACEHOLDER)]


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=~is_done)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if unfinished(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-g")
    def _edit(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return keys


def _history(path: Path) -> History:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.read_bytes()[:1]
    except OSError as error:
        note(f"note: line history is not kept: {error}")
        return InMemoryHistory()
    return FileHistory(path)


class _Commands(Completer):
    """Completes slash commands and the names of sampling options."""

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        word, space, rest = text[1:].partition(" ")
        if not space:
            for command in COMMANDS:
                if command.name.startswith(word):
                    yield Completion(command.name, -len(word), display_meta=command.help)
        elif word == "set" and " " not in rest and "=" not in rest:
            for option in SamplingParams.options():
                if option.name.startswith(rest):
                    yield Completion(option.name, -len(rest), display_meta=option.help)
