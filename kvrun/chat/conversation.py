"""Conversation: messages and branches of one chat; for a line session, a screen and a store."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvrun.chat.pictures import content
from kvrun.errors import InvalidRequest, KvrunError

ROLES = ("user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn. `parent` is the message it answers; `meta` holds plain values (counts, times)."""

    id: int
    parent: int | None
    role: str
    content: str
    meta: Mapping[str, Any] = field(default_factory=dict)


class Conversation:
    """A tree of messages whose current branch ends at `head`.

    Messages never change: a new answer and an edited question are siblings of the old ones.
    """

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.head: int | None = None
        self._messages: dict[int, Message] = {}

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[Message]:
        """All messages of all branches, oldest first."""
        return iter(self._messages.values())

    def __getitem__(self, message_id: int) -> Message:
        try:
            return self._messages[message_id]
        except KeyError:
            raise InvalidRequest(f"this conversation has no message {message_id}.") from None

    def branch(self) -> list[Message]:
        """The current branch, from the first message to `head`."""
        path = []
        at = self.head
        while at is not None:
            path.append(self._messages[at])
            at = self._messages[at].parent
        return path[::-1]

    def prompt(self) -> list[dict[str, Any]]:
        """The current branch in the form a chat template takes; `meta` may name `images`, paths."""
        system: list[dict[str, Any]] = []
        if self.system:
            system.append({"role": "system", "content": self.system})
        return system + [
            {"role": m.role, "content": content(m.content, m.meta.get("images", ()))}
            for m in self.branch()
        ]

    def add(self, role: str, content: str, **meta: Any) -> Message:
        """Append below `head`, which moves to the new message."""
        if role not in ROLES:
            raise InvalidRequest(f"role is '{role}'.", hint=f"one of: {', '.join(ROLES)}")
        message = Message(max(self._messages, default=0) + 1, self.head, role, content, meta)
        self._messages[message.id] = message
        self.head = message.id
        return message

    def again(self) -> Message:
        """Go back to the last question, so that the next answer becomes a sibling; returns it."""
        for message in reversed(self.branch()):
            if message.role == "user":
                self.head = message.id
                return message
        raise InvalidRequest("there is no question to answer again.")

    def edit(self, message_id: int, content: str, **meta: Any) -> Message:
        """A sibling of a message with other content; `head` moves to it."""
        old = self[message_id]
        self.head = old.parent
        return self.add(old.role, content, **meta)

    def undo(self) -> None:
        """Take the message at `head` back; it must have no answer yet."""
        if self.head is None or any(m.parent == self.head for m in self):
            raise InvalidRequest("only a message without answers can be taken back.")
        self.head = self._messages.pop(self.head).parent

    def siblings(self, message_id: int) -> list[Message]:
        """All versions of a message, itself included, oldest first."""
        parent = self[message_id].parent
        return [m for m in self if m.parent == parent]

    def switch(self, message_id: int) -> None:
        """Make the branch through a message the current one, down to its newest end."""
        at: int | None = self[message_id].id
        while at is not None:
            self.head = at
            at = max((m.id for m in self if m.parent == at), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; `from_dict` is the way back."""
        rows = [
            {
                "id": m.id,
                "parent": m.parent,
                "role": m.role,
                "content": m.content,
                "meta": dict(m.meta),
            }
            for m in self
        ]
        return {"system": self.system, "head": self.head, "messages": rows}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Conversation":
        """Raises KvrunError for anything that is not a tree of messages."""
        conversation = cls()
        try:
            conversation.system = str(plain["system"])
            for row in plain["messages"]:
                parent, role = row["parent"], row["role"]
                if parent is not None and parent not in conversation._messages:
                    raise ValueError(f"message {row['id']} answers one that does not exist")
                if role not in ROLES or row["id"] in conversation._messages:
                    raise ValueError(f"message {row['id']} has a wrong role or stands twice")
                message = Message(
                    int(row["id"]), parent, role, str(row["content"]), dict(row["meta"])
                )
                conversation._messages[message.id] = message
            head = plain["head"]
            if head is not None and head not in conversation._messages:
                raise ValueError(f"its last message, {head}, does not exist")
            conversation.head = head
        except (KeyError, TypeError, ValueError) as error:
            raise KvrunError("this is not a stored conversation.", cause=str(error)) from error
        return conversation
