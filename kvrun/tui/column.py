"""Column: one conversation on the screen, its keys, and what it says of itself in its border."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message as Event

from kvrun.chat.blocks import code_blocks
from kvrun.chat.conversation import Message
from kvrun.chat.printable import printable
from kvrun.errors import KvrunError
from kvrun.tui.keys import COLUMN
from kvrun.tui.message import Answer, Entry, Note, Question
from kvrun.tui.talk import Talk

SHOWN = 50  # messages on the screen; earlier ones come when they are asked for


class Column(VerticalScroll, can_focus=True):
    """Shows a Talk. `number` is its place, from 1; it names the column everywhere."""

    BINDINGS: ClassVar[list[BindingType]] = [*COLUMN]
    HELP = "One conversation. Its keys work while it has the focus; Tab goes there and back."

    @dataclass
    class Focused(Event):
        """The user looks at this column now."""

        column: "Column"

    @dataclass
    class Edit(Event):
        """A question shall be asked in other words."""

        talk: Talk
        message: Message

    def __init__(self, talk: Talk, number: int) -> None:
        super().__init__(id=f"column-{id(talk)}", classes="column")
        self.talk = talk
        self.number = number
        self._shown: list[Entry] = []  # one for each message, in the order of the branch
        self._live: Answer | None = None
        self._turn = 0  # which answer of the talk that is
        self._notes: list[Note] = []
        self._said: object = None  # the error that stands below
        self._selected: int | None = None  # a message's id
        self._from = 0  # messages before this are not on the screen
        self._next_code = 0

    def on_mount(self) -> None:
        self.anchor()
        self.renumber(self.number)
        self.sync()

    def on_focus(self) -> None:
        self.post_message(self.Focused(self))

    def renumber(self, number: int) -> None:
        """Take a place; the colour of the border follows it."""
        self.remove_class(f"-place-{self.number}")
        self.number = number
        self.add_class(f"-place-{number}")
        self.head()

    def head(self) -> None:
        """Write the border: who answers, whether the prompt goes there, counts and times."""
        talk = self.talk
        alone = "" if talk.linked else " ⊘"
        self.border_title = Content(printable(f"{self.number} {talk.label}{alone}"))
        line = talk.line(self.size.width)
        if talk.stopped and not talk.busy:
            line += " · stopped" if "abort" not in line else ""
        self.border_subtitle = Content(line)

    # -- the branch on the screen -------------------------------------------------------------

    def tick(self) -> None:
        """Show what has come since the last tick."""
        talk = self.talk
        if self._live is not None and self._turn != talk.turn:
            self._live.remove()  # it has ended and another one has begun between two ticks
            self._live = None
        if talk.busy or self._live is not None:
            self._stream()
            self.head()
        if [m.id for m in talk.conversation.branch()[self._from :]] != self._ids():
            self.sync()
        if talk.error is not self._said:
            self._said = talk.error
            if talk.error is not None:
                self.say(f"error: {talk.error}\nr asks again", error=True)

    def _ids(self) -> list[int]:
        return [entry.message.id for entry in self._shown if entry.message]

    def _stream(self) -> None:
        talk = self.talk
        if self._live is None:
            self.sync()
            self._live, self._turn = Answer(), talk.turn
            self.mount(self._live)
            self.anchor()
        if text := talk.take():
            self._live.grow(text)
        if talk.busy:
            return
        live, self._live = self._live, None
        if talk.reply is not None and talk.reply.text and talk.last_answer:
            live.finish(talk.last_answer)
            self._shown.append(live)
        else:
            live.remove()

    def sync(self) -> None:
        """Make the entries those of the current branch; what has not changed stays."""
        branch = self.talk.conversation.branch()
        self._from = min(self._from, len(branch)) if self._from else max(0, len(branch) - SHOWN)
        wanted = branch[self._from :]
        same = 0
        for entry, message in zip(self._shown, wanted, strict=False):
            if entry.message is None or entry.message.id != message.id:
                break
            same += 1
        for entry in self._shown[same:]:
            entry.remove()
        del self._shown[same:]
        if same < len(wanted):
            self._clear_notes()
        for message in wanted[same:]:
            entry = self._entry(message)
            self._shown.append(entry)
            self.mount(entry)
        self.head()

    def _entry(self, message: Message) -> Entry:
        versions = [m.id for m in self.talk.conversation.siblings(message.id)]
        which = f"{versions.index(message.id) + 1}/{len(versions)}" if len(versions) > 1 else ""
        kind = Question if message.role == "user" else Answer
        return kind(message, which)

    def rebuild(self) -> None:
        """Show the conversation anew: it has become another one."""
        for entry in self._shown:
            entry.remove()
        self._shown.clear()
        self._from, self._selected = 0, None
        self._clear_notes()
        self.sync()

    def say(self, text: str, *, error: bool = False) -> None:
        """A note below; it goes when the conversation goes on."""
        note = Note(text, error=error)
        self._notes.append(note)
        self.mount(note)
        self.anchor()

    def _clear_notes(self) -> None:
        for note in self._notes:
            note.remove()
        self._notes.clear()

    # -- one of its messages --------------------------------------------------------------------

    @property
    def selected(self) -> Message | None:
        """The message that the keys mean: the one that was chosen, else the last answer."""
        for entry in self._shown:
            if entry.message is not None and entry.message.id == self._selected:
                return entry.message
        return self.talk.last_answer or self.talk.last_question

    @property
    def chosen(self) -> bool:
        """Whether a message was chosen with the keys."""
        return self._selected is not None

    def action_select(self, step: int) -> None:
        """Choose the message above or below."""
        ids = [e.message.id for e in self._shown if e.message]
        if not ids:
            return
        place = ids.index(self._selected) + step if self._selected in ids else len(ids) - 1
        self._choose(ids[min(max(place, 0), len(ids) - 1)])

    def action_first(self) -> None:
        """Go to the beginning; earlier messages that are not shown come back."""
        if self._from:
            self._from = 0
            for entry in self._shown:
                entry.remove()
            self._shown.clear()
            self.sync()
        self.release_anchor()
        if self._shown and self._shown[0].message:
            self._choose(self._shown[0].message.id)

    def action_last(self) -> None:
        """Go to the end and stay there."""
        self._choose(None)
        self.anchor()

    def _choose(self, message_id: int | None) -> None:
        self._selected = message_id
        self._next_code = 0
        for entry in self._shown:
            chosen = entry.message is not None and entry.message.id == message_id
            entry.select(chosen)
            if chosen:
                self.scroll_to_widget(entry, animate=False)

    # -- keys -----------------------------------------------------------------------------------

    def action_edit(self) -> None:
        """Put a question back into the prompt; it is asked on a branch of its own."""
        message = self.selected
        if message is None or message.role != "user":
            message = self.talk.last_question
        if message is None:
            self.notify("there is no question to edit")
        else:
            self.post_message(self.Edit(self.talk, message))

    def action_again(self) -> None:
        """Have the last question answered again."""
        self.guarded(self.talk.again)

    def action_branch(self, step: int) -> None:
        """Show another version of the chosen message, or of the last that has any."""
        chosen = self.selected.id if self._selected is not None and self.selected else None
        self.guarded(lambda: self._branch(step, chosen))

    def _branch(self, step: int, chosen: int | None) -> None:
        if not self.talk.switch(step, chosen):
            self.notify("there is no other version; e or r make one")
        self._choose(None)

    def guarded(self, change: Callable[[], None]) -> None:
        """Change the conversation, unless an answer comes into it."""
        if self.talk.busy:
            self.notify("this column still answers; x stops it")
            return
        try:
            change()
        except KvrunError as error:
            self.notify(str(error), severity="error", markup=False)
        self.tick()

    def action_stop(self) -> None:
        """End the answer of this column."""
        self.talk.stop()

    def action_copy(self) -> None:
        """Copy the chosen message, else the last answer."""
        if message := self.selected:
            self._copy(message.content, "the message")

    def action_copy_code(self) -> None:
        """Copy a code block of that message; the next one when pressed again."""
        blocks = code_blocks(self.selected.content) if self.selected else []
        if not blocks:
            self.notify("the message has no code block")
            return
        place = self._next_code % len(blocks)
        self._next_code += 1
        self._copy(blocks[place], f"code block {place + 1} of {len(blocks)}")

    def _copy(self, text: str, what: str) -> None:
        self.app.copy_to_clipboard(printable(text))
        self.notify(f"{what} is copied, if the terminal allows it; ^s writes a file")

    def action_facts(self) -> None:
        """Say everything that is known of the chosen message."""
        if message := self.selected:
            facts = [f"{name.replace('_', ' ')}: {value}" for name, value in message.meta.items()]
            self.say(
                "\n".join([f"message {message.id}, {len(message.content)} characters", *facts])
            )
