"""The tree of messages: branches, siblings, and its way through plain values."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrun.chat.conversation import Conversation
from kvrun.errors import InvalidRequest, KvrunError


def contents(conversation: Conversation) -> list[str]:
    return [m.content for m in conversation.branch()]


def two_turns() -> Conversation:
    conversation = Conversation("be brief")
    for role, text in [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]:
        conversation.add(role, text)
    return conversation


def test_the_prompt_is_the_branch_with_its_system_prompt() -> None:
    conversation = two_turns()
    assert [m["role"] for m in conversation.prompt()] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in conversation.prompt()] == ["be brief", "q1", "a1", "q2", "a2"]
    conversation.system = ""
    assert conversation.prompt()[0] == {"role": "user", "content": "q1"}


def test_an_answer_given_again_is_a_sibling() -> None:
    conversation = two_turns()
    first = conversation.branch()[-1]
    assert conversation.again().content == "q2"
    second = conversation.add("assistant", "a2 again")
    assert contents(conversation) == ["q1", "a1", "q2", "a2 again"]
    assert conversation.siblings(second.id) == [first, second]
    conversation.switch(first.id)
    assert contents(conversation) == ["q1", "a1", "q2", "a2"]


def test_an_edited_question_begins_a_branch_and_keeps_the_old_one() -> None:
    conversation = two_turns()
    old = conversation.branch()[0]
    conversation.edit(old.id, "q1 other")
    assert contents(conversation) == ["q1 other"]
    conversation.add("assistant", "a1 other")
    conversation.switch(old.id)
    assert contents(conversation) == ["q1", "a1", "q2", "a2"]  # down to the end of that branch


def test_a_question_without_answer_can_be_taken_back() -> None:
    conversation = two_turns()
    conversation.add("user", "q3")
    conversation.undo()
    assert contents(conversation) == ["q1", "a1", "q2", "a2"]
    assert len(conversation) == 4
    conversation.switch(conversation.branch()[0].id)
    conversation.head = conversation.branch()[0].id
    with pytest.raises(InvalidRequest, match="without answers"):
        conversation.undo()


def test_what_cannot_be_done_says_so() -> None:
    empty = Conversation()
    with pytest.raises(InvalidRequest, match="no question"):
        empty.again()
    with pytest.raises(InvalidRequest, match="without answers"):
        empty.undo()
    with pytest.raises(InvalidRequest, match="no message 7"):
        empty.switch(7)
    with pytest.raises(InvalidRequest, match="role is 'robot'"):
        empty.add("robot", "beep")


@given(st.lists(st.tuples(st.sampled_from(["add", "again", "edit", "switch"]), st.integers(0, 99))))
def test_any_tree_survives_json(steps: list[tuple[str, int]]) -> None:
    conversation = Conversation("s")
    for action, number in steps:
        messages = list(conversation)
        if action == "add" or not messages:
            role = ("user", "assistant")[len(conversation.branch()) % 2]
            conversation.add(role, f"text {number}", tokens=number)
        elif action == "again":
            conversation.again()
        elif action == "edit":
            conversation.edit(messages[number % len(messages)].id, "other")
        else:
            conversation.switch(messages[number % len(messages)].id)
    back = Conversation.from_dict(json.loads(json.dumps(conversation.to_dict())))
    assert list(back) == list(conversation)
    assert (back.head, back.system) == (conversation.head, conversation.system)
    assert back.branch() == conversation.branch()
    back.add("user", "more")  # ids go on where they were
    assert len(back) == len(conversation) + 1


ROW = {"id": 1, "parent": None, "role": "user", "content": "q", "meta": {}}


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"system": "", "head": 1, "messages": []},
        {"system": "", "head": None, "messages": [{"id": 1}]},
        {"system": "", "head": None, "messages": [{**ROW, "parent": 9}]},
        {"system": "", "head": None, "messages": [{**ROW, "role": "robot"}]},
        {"system": "", "head": None, "messages": [ROW, ROW]},
        {"system": "", "head": None, "messages": 3},
    ],
)
def test_damaged_values_are_refused(damaged: dict) -> None:
    with pytest.raises(KvrunError, match="not a stored conversation"):
        Conversation.from_dict(damaged)
