"""Conversations as files: what is in them, what comes back, what is refused."""

from pathlib import Path

import pytest

from kvrun.chat.conversation import Conversation
from kvrun.chat.export import Exported, from_jsonl, to_jsonl, to_markdown, write
from kvrun.errors import InvalidRequest, KvrunError


def branched() -> Conversation:
    conversation = Conversation("be kind")
    conversation.add("user", "q — 雪\nline two")
    conversation.add("assistant", "a", speaker="sql", completion_tokens=1)
    conversation.again()
    conversation.add("assistant", "b")
    conversation.edit(1, "Q")
    return conversation


def test_every_branch_comes_back_from_jsonl() -> None:
    items = [Exported(branched(), "tiny", "sql"), Exported(Conversation(), "tiny")]
    back = from_jsonl(to_jsonl(items))
    assert [(one.model, one.adapter) for one in back] == [("tiny", "sql"), ("tiny", "")]
    assert [o.conversation.to_dict() for o in back] == [o.conversation.to_dict() for o in items]


def test_markdown_holds_the_branch_on_the_screen() -> None:
    conversation = branched()
    conversation.switch(2)
    assert to_markdown([Exported(conversation, "tiny", "sql")]) == (
        "# tiny · sql\n\n*System:* be kind\n\n**You:**\n\nq — 雪\nline two\n\n**sql:**\n\na\n"
    )


@pytest.mark.parametrize("text", ["nonsense", '{"id": 1}', "[1]"])
def test_a_damaged_file_names_its_line(text: str) -> None:
    with pytest.raises(KvrunError, match="line 1 is no exported message"):
        from_jsonl(text)


def test_writing(tmp_path: Path) -> None:
    items = [Exported(branched(), "tiny")]
    with pytest.raises(InvalidRequest, match=r"'x\.txt' names no format"):
        write(tmp_path / "x.txt", items)
    path = tmp_path / "x.md"
    write(path, items)
    first = path.read_text()
    with pytest.raises(InvalidRequest, match="is there already"):
        write(path, [])
    assert path.read_text() == first
    write(path, [Exported(Conversation(), "other")], replace=True)
    assert path.read_text() == "# other\n"
    with pytest.raises(KvrunError, match="cannot be written.\ncause: [A-Z]"):
        write(tmp_path / "no" / "x.md", items)
    assert [p.name for p in tmp_path.iterdir()] == ["x.md"]
