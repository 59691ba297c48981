"""Column: one conversation on the screen, its keys, and what it says of itself in its border."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from textual.binding import BindingType
from textual.content import Content
from textual.geometry import Region
from textual.message import Message as Event

from kvrun.chat.blocks import code_blocks
from kvrun.chat.conversation import Message
from kvrun.chat.printable import printable
from kvrun.errors import KvrunError
from kvrun.tui.entry import Answer, Entry, Growing, Note, Question
from kvrun.tui.keys import COLUMN
from kvrun.tui.sheet import Sheet
from kvrun.tui.talk import Talk

BORDER = 4  # ticks between two looks at its counts
COLORS = 8  # places with a colour of their own
SHOWN = 50  # messages on the screen; earlier ones come when they are asked for


class Column(Sheet):
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
        self._conversation = talk.conversation
        self._notes: list[Note] = []
        self._live: Growing | None = None
        self._turn = 0  # which answer of the talk that is
        self._said: object = None  # the error that stands below
        self._from: int | None = None  # messages before this are not on the screen
        self._next_code = 0
        self._ticks = 0
        self._head = ("", "")

    def on_mount(self) -> None:
        self.border_title = ""
        self.renumber(self.number)
        self.sync()

    def on_focus(self) -> None:
        self.post_message(self.Focused(self))

    def renumber(self, number: int) -> None:
        """Take a place, and the colour that the map of pages has for it."""
        self.remove_class(f"-place-{(self.number - 1) % COLORS + 1}")
        self.add_class(f"-place-{(number - 1) % COLORS + 1}")
        self.number = number
        self.head()

    def head(self) -> None:
        """Write the border: who answers, whether the prompt goes there, counts and times."""
        talk = self.talk
        alone = "" if talk.linked else " ⊘"
        words = (printable(f"{self.number} {talk.label}{alone}"), talk.line(self.size.width))
        if words != self._head:
            self._head = words
            self.border_title, self.border_subtitle = map(Content, words)

    def on_resize(self) -> None:
        self.head()

    def flow(self) -> None:
        """Lay everything out that stands here."""
        live = [self._live] if self._live is not None else []
        self.lay_out([*self._shown, *live, *self._notes])

    # -- the branch on the screen -------------------------------------------------------------

    def tick(self) -> None:
        """Show what has come since the last tick."""
        talk = self.talk
        if talk.conversation is not self._conversation:
            self.rebuild()  # its messages have the numbers of others
        if self._live is not None and self._turn != talk.turn:
            self._live = None  # it has ended and another one has begun between two ticks
        if talk.busy or self._live is not None:
            self._stream()
            # A border that changes draws the whole column.
            self._ticks += 1
            if not talk.busy or self._ticks % BORDER == 1:
                self.head()
        if [m.id for m in talk.conversation.branch()[self._from or 0 :]] != self._ids():
            self.sync()
        if talk.error is not self._said:
            self._said = talk.error
            if talk.error is not None:
                self.say(f"{talk.error}\nr asks again", error=True)

    def _ids(self) -> list[int]:
        return [entry.message.id for entry in self._shown if entry.message]

    def _stream(self) -> None:
        talk = self.talk
        began = self._live is None
        if self._live is None:
            self.sync()
            self._live, self._turn = Growing(), talk.turn
        text = talk.take()
        if text:
            self._live.grow(text)
        if not talk.busy:
            live, self._live = self._live, None
            answer = talk.last_answer if talk.reply is not None and talk.reply.text else None
            if answer is not None and answer.id == talk.conversation.head:
                live.finish(answer, self._versions(answer))
                self._shown.append(live)
            self.sync()
            self.flow()
        elif began:
            self._drawn = []
            self._at_end = True
            self.flow()
        elif text and self._notes:
            self.flow()
        elif text:
            self.grow(self._live)

    def sync(self) -> None:
        """Make the entries those of the current branch; what has not changed stays."""
        branch = self.talk.conversation.branch()
        if self._from is None or self._from > len(branch):
            self._from = max(0, len(branch) - SHOWN) or None
        wanted = branch[self._from or 0 :]
        known = {e.message.id: e for e in self._shown if e.message is not None}
        before = self._ids()
        self._shown = [known.get(message.id) or self._entry(message) for message in wanted]
        if before != self._ids():
            self._notes.clear()
            self.flow()
        self.head()

    def _entry(self, message: Message) -> Entry:
        which = self._versions(message)
        return Question(message, which) if message.role == "user" else Answer(message, which)

    def _versions(self, message: Message) -> str:
        """Like "2/3" for the second of three; nothing for the only one."""
        ids = [m.id for m in self.talk.conversation.siblings(message.id)]
        return f"{ids.index(message.id) + 1}/{len(ids)}" if len(ids) > 1 else ""

    def rebuild(self) -> None:
        """Show the conversation anew: it has become another one."""
        self._conversation = self.talk.conversation
        self._live = None
        self._shown.clear()
        self._notes.clear()
        self._from = self._selected = None
        self.sync()
        self.flow()
        self.scroll_end(animate=False)

    def say(self, text: str, *, error: bool = False) -> None:
        """A note below; it goes when the conversation goes on."""
        self._notes.append(Note(text, error=error))
        self.flow()
        self.scroll_end(animate=False)

    # -- one of its messages --------------------------------------------------------------------

    @property
    def selected(self) -> Message | None:
        """The message that the keys mean: the one that was chosen, else the last answer."""
        for entry in self._shown:
            if entry.message is not None and entry.message.id == self._selected:
                return entry.message
        return self.talk.last_answer or self.talk.last_question

    def action_select(self, step: int) -> None:
        """Choose the message above or below."""
        ids = self._ids()
        if not ids:
            return
        place = ids.index(self._selected) + step if self._selected in ids else len(ids) - 1
        self._choose(ids[min(max(place, 0), len(ids) - 1)])

    def action_first(self) -> None:
        """Go to the beginning; earlier messages that are not shown come back."""
        if self._from:
            self._from = 0
            self._shown.clear()
            self.sync()
        if ids := self._ids():
            self._choose(ids[0])
        self.scroll_home(animate=False)

    def action_last(self) -> None:
        """Go to the end and stay there."""
        self._choose(None)
        self.scroll_end(animate=False)

    def _choose(self, message_id: int | None) -> None:
        self._selected = message_id
        self._next_code = 0
        for place, entry in enumerate(self._shown):
            if entry.message is not None and entry.message.id == message_id:
                assert self._ink
                height = len(entry.lines(self._ink))
                region = Region(0, self._starts[place], 1, min(height, self.size.height))
                self.scroll_to_region(region, animate=False)
        self.refresh()

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
