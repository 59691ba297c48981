"""Conversations as files: Markdown for people, JSONL that can be read back."""

import json
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrun.chat.conversation import Conversation
from kvrun.errors import InvalidRequest, KvrunError

SUFFIXES = (".md", ".jsonl")


@dataclass(frozen=True)
class Exported:
    """A conversation with what the file says of it."""

    conversation: Conversation
    model: str
    adapter: str = ""


def to_markdown(items: Iterable[Exported]) -> str:
    """The current branch of each, questions as headings' text, answers as they are."""
    parts = []
    for item in items:
        parts.append(f"# {item.model}" + (f" · {item.adapter}" if item.adapter else ""))
        if item.conversation.system:
            parts.append(f"*System:* {item.conversation.system}")
        for message in item.conversation.branch():
            who = "You" if message.role == "user" else message.meta.get("speaker") or item.model
            parts += [f"**{who}:**", message.content.strip("\n")]
    return "\n\n".join(parts) + "\n"


def to_jsonl(items: Iterable[Exported]) -> str:
    """Every message of every branch: a line for the conversation, then one for each message."""
    lines = []
    for item in items:
        plain = item.conversation.to_dict()
        head = {"conversation": {"model": item.model, "adapter": item.adapter}}
        head["conversation"] |= {"system": plain["system"], "head": plain["head"]}
        lines += [head, *plain["messages"]]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def from_jsonl(text: str) -> list[Exported]:
    """What `to_jsonl` wrote. Raises KvrunError, with the line, for anything else."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            if "conversation" in row:
                found.append({**row["conversation"], "messages": []})
            else:
                found[-1]["messages"].append(row)
        except (ValueError, TypeError, IndexError) as error:
            raise KvrunError(f"line {number} is no exported message.", cause=str(error)) from error
    return [
        Exported(Conversation.from_dict(one), str(one.get("model")), str(one.get("adapter", "")))
        for one in found
    ]


def write(path: Path, items: Iterable[Exported], *, replace: bool = False) -> None:
    """Write a file whose suffix names the form; all of it or nothing.

    Raises InvalidRequest for another suffix, and for a file that is there unless `replace`.
    """
    if path.suffix not in SUFFIXES:
        raise InvalidRequest(
            f"'{path.name}' names no format.", hint=f"end the name with {' or '.join(SUFFIXES)}"
        )
    if path.exists() and not replace:
        raise InvalidRequest(f"{path} is there already.", hint="choose another name")
    text = to_markdown(items) if path.suffix == ".md" else to_jsonl(items)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise KvrunError(f"{path} cannot be written.", cause=error.strerror or "") from error
