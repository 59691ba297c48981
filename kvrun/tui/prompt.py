"""Prompt: where a question is typed; several lines, history, an editor, pastes of any size."""

import os
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual import events
from textual.app import SuspendNotSupported
from textual.binding import BindingType
from textual.message import Message
from textual.widgets import TextArea

from kvrun.chat.commands import COMMANDS
from kvrun.chat.history import History
from kvrun.chat.lines import is_command
from kvrun.chat.printable import printable
from kvrun.tui.keys import PROMPT

LONG = 4000  # characters; a longer paste is kept aside, and a word stands for it


class Prompt(TextArea):
    """Posts `Sent` with the whole text; `most` is how many characters the model can take at all."""

    BINDINGS: ClassVar[list[BindingType]] = [*PROMPT]
    HELP = "Enter sends to all linked columns; @NAME in front asks one; / begins a command."

    @dataclass
    class Sent(Message):
        """A question or a command."""

        text: str

    @dataclass
    class Refused(Message):
        """A paste that the model cannot take."""

        characters: int

    def __init__(self, history: History) -> None:
        super().__init__(id="prompt", soft_wrap=True, show_line_numbers=False, compact=True)
        self.asked = history
        self.names: list[str] = []  # that @ may name
        self.most: int | None = None
        self._pasted: dict[str, str] = {}
        self._at = 0  # how many entries back in the history
        self._draft = ""

    @property
    def whole(self) -> str:
        """The text with what was pasted in the place of the words for it."""
        text = self.text
        for word, pasted in self._pasted.items():
            text = text.replace(word, pasted)
        return text

    def replace_all(self, text: str) -> None:
        """Put a text here, and the cursor behind it."""
        self._pasted.clear()
        self._at = 0
        self._fill(text)

    def _fill(self, text: str) -> None:
        self.load_text(self._aside(text) if len(text) > LONG else text)
        self.move_cursor(self.document.end)

    def empty(self) -> None:
        """What was typed has been taken."""
        self.asked.add(self.whole)
        self.replace_all("")

    # -- keys -------------------------------------------------------------------------------

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            self.action_send()

    def action_send(self) -> None:
        """Have the text asked."""
        if self.text.strip():
            self.post_message(self.Sent(self.whole))

    def action_newline(self) -> None:
        """Begin a line."""
        self.insert("\n")

    def action_earlier(self) -> None:
        """Up; from the first line, to the question before."""
        if self.cursor_at_first_line:
            self._recall(1)
        else:
            self.action_cursor_up()

    def action_later(self) -> None:
        """Down; from the last line, to the question after."""
        if self.cursor_at_last_line:
            self._recall(-1)
        else:
            self.action_cursor_down()

    def _recall(self, step: int) -> None:
        entries = self.asked.entries
        at = self._at + step
        if not 0 <= at <= len(entries):
            return
        if self._at == 0:
            self._draft = self.text
        self._at = at
        self._fill(entries[-at] if at else self._draft)

    def action_editor(self) -> None:
        """Write the text with the user's own editor."""
        editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompt.md"
            path.write_text(self.whole, encoding="utf-8")
            try:
                with self.app.suspend():
                    subprocess.run([*editor, str(path)], check=True)
                text = path.read_text(encoding="utf-8", errors="replace")
            except (OSError, subprocess.CalledProcessError, SuspendNotSupported) as error:
                self.notify(f"{editor[0]}: {error}", severity="error", markup=False)
                return
        self.replace_all(text.removesuffix("\n"))

    # -- pastes -----------------------------------------------------------------------------

    async def _on_paste(self, event: events.Paste) -> None:
        text = event.text
        if self.most is not None and len(text) > self.most:
            self.post_message(self.Refused(len(text)))
        elif len(text) > LONG:
            self.insert(self._aside(text))
        else:
            return
        event.stop()
        event.prevent_default()

    def _aside(self, text: str) -> str:
        """Keep a long text, and give the word that stands for it."""
        word = f"[pasted {len(self._pasted) + 1}: {len(text):,} characters]"
        self._pasted[word] = text
        return word

    # -- help while typing --------------------------------------------------------------------

    def hint(self) -> str:
        """Which commands or columns the beginning of the text could mean."""
        text = self.text.lstrip()
        word = text.split(maxsplit=1)[0] if text else ""
        if is_command(text) and word == text:
            fits = [c for c in COMMANDS if c.name.startswith(word[1:].lower())]
            if len(fits) == 1:
                return f"/{fits[0].name} {fits[0].args}".strip() + f": {fits[0].help}"
            return " ".join(f"/{c.name}" for c in fits)
        if word.startswith("@") and not word.startswith("@@") and word == text:
            names = [n for n in self.names if n.casefold().startswith(word[1:].casefold())]
            return printable(" ".join(f"@{name}" for name in names))
        return ""
