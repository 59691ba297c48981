"""Columns: who is asked, what streams, what stops, branches, copies; as a user does it."""

from collections.abc import Callable
from typing import Any

import pytest

from kvrun.chat.conversation import Conversation

Show = Callable[..., Any]


async def test_a_question_goes_to_all_columns_and_each_adapter_answers(show: Show) -> None:
    async with show("sql", "pirate") as screen:
        await screen.ask("who?")
        await screen.answered()
        answers = [talk.last_answer.content for talk in screen.board.talks]
        assert answers == ["I am None", "I am sql", "I am pirate"]
        await screen.sees("1 base", "2 sql", "3 pirate", "I am sql", "I am pirate")
        assert screen.app.prompt.text == ""


async def test_all_columns_stream_at_the_same_time(show: Show) -> None:
    async with show("sql", "pirate", "json") as screen:
        await screen.ask("hold")
        await screen.until(lambda: all("half" in screen.says(n) for n in (1, 2, 3, 4)))
        assert len(screen.engine.live) == 4
        await screen.sees("●", "batch 4")
        screen.engine.go.set()
        await screen.answered()
        assert all("half whole" in screen.says(n) for n in (1, 2, 3, 4))


async def test_the_border_tells_counts_speed_first_token_and_reason(show: Show) -> None:
    async with show(size=(120, 20)) as screen:
        await screen.ask("say hello")
        await screen.answered()
        await screen.until(lambda: "stop" in str(screen.column(1).border_subtitle))
        line = str(screen.column(1).border_subtitle)
        assert line.startswith("6 tok · ")  # five letters and the end of text
        assert " tok/s · first 0." in line
        assert line.endswith(" s · stop")


@pytest.mark.parametrize(
    ("text", "asked"),
    [("@sql say x", [2]), ("@2 say x", [2]), ("@base @3 say x", [1, 3]), ("@all say x", [1, 2, 3])],
)
async def test_a_name_in_front_asks_those_columns_only(
    show: Show, text: str, asked: list[int]
) -> None:
    async with show("sql", "pirate") as screen:
        screen.column(3).talk.linked = False
        await screen.ask(text)
        await screen.answered()
        answered = [n for n in (1, 2, 3) if screen.column(n).talk.last_answer]
        assert answered == asked
        assert screen.column(asked[0]).talk.last_question.content == "say x"


async def test_an_unknown_name_is_said_and_the_question_stays(show: Show) -> None:
    async with show("pirate") as screen:
        await screen.ask("@pirat hello")
        await screen.until(lambda: "no column is called 'pirat'" in screen.notices())
        assert "did you mean @pirate?" in screen.notices()
        assert screen.app.prompt.text == "@pirat hello"
        await screen.ask("@@pirat is a word")
        await screen.answered()
        assert screen.column(1).talk.last_question.content == "@pirat is a word"


async def test_linked_and_aimed(show: Show) -> None:
    async with show("sql", "pirate") as screen:
        screen.column(2).focus()
        await screen.pilot.press("space")
        await screen.sees("2 sql ⊘", "prompt → 2 linked")
        await screen.ask("say one")
        await screen.answered()
        assert [bool(t.last_answer) for t in screen.board.talks] == [True, False, True]
        await screen.pilot.press("f6")
        await screen.sees("prompt → 2 sql")
        await screen.ask("say two")
        await screen.answered()
        assert [len(t.conversation) for t in screen.board.talks] == [2, 2, 2]


async def test_columns_come_and_go(show: Show) -> None:
    async with show("sql") as screen:
        await screen.ask("say kept")
        await screen.answered()
        screen.column(2).focus()
        await screen.pilot.press("minus")
        assert [t.label for t in screen.board.talks] == ["base"]
        await screen.pilot.press("minus")
        await screen.until(lambda: "the last column stays" in screen.notices())
        await screen.pilot.press("plus")
        await screen.sees("a new column: who answers?")
        await screen.pilot.press(*"sql", "enter")
        await screen.until(lambda: len(screen.app.columns.all) == 2)
        assert [t.label for t in screen.board.talks] == ["base", "sql"]
        assert "kept" in screen.says(1)


async def test_zoom_and_jump(show: Show) -> None:
    async with show("sql", "pirate") as screen:
        screen.column(1).focus()
        await screen.pilot.press("2", "z")
        assert [column.display for column in screen.app.columns.all] == [False, True, False]
        await screen.sees("2 out of sight")
        await screen.pilot.press("right_square_bracket")
        assert [column.display for column in screen.app.columns.all] == [False, False, True]
        await screen.pilot.press("z")
        assert all(column.display for column in screen.app.columns.all)


async def test_escape_stops_the_current_column_then_all(show: Show) -> None:
    async with show("sql", "pirate") as screen:
        await screen.ask("hang")
        await screen.until(lambda: all("think" in screen.says(n) for n in (1, 2, 3)))
        await screen.pilot.press("escape")
        await screen.until(lambda: [t.busy for t in screen.board.talks] == [False, True, True])
        await screen.pilot.press("escape")
        await screen.answered()
        assert not screen.engine.live  # the engine has heard of it
        assert "Let me think" in screen.column(1).talk.last_answer.content
        await screen.until(lambda: "abort" in str(screen.column(1).border_subtitle))


async def test_a_column_that_answers_is_not_asked(show: Show) -> None:
    async with show("sql") as screen:
        await screen.ask("@sql hold")
        await screen.until(lambda: "half" in screen.says(2))
        await screen.ask("say next")
        await screen.until(lambda: "1 still answering" in screen.notices())
        await screen.until(lambda: screen.column(1).talk.last_answer)
        assert screen.column(2).talk.last_question.content == "hold"


async def test_answer_again_makes_a_version_and_the_old_one_comes_back(show: Show) -> None:
    async with show() as screen:
        await screen.ask("say first")
        await screen.answered()
        screen.column(1).focus()
        await screen.pilot.press("r")
        await screen.answered()
        await screen.sees("‹2/2›")
        await screen.pilot.press("less_than_sign")
        await screen.sees("‹1/2›")
        assert len(screen.column(1).talk.conversation) == 3


async def test_edit_and_ask_again_makes_a_branch(show: Show) -> None:
    async with show() as screen:
        await screen.ask("say frist")
        await screen.answered()
        screen.column(1).focus()
        await screen.pilot.press("e")
        await screen.sees("edit → column 1")
        assert screen.app.prompt.text == "say frist"
        await screen.ask("say first")
        await screen.answered()
        conversation = screen.column(1).talk.conversation
        assert [m.content for m in conversation.branch()] == ["say first", "first"]
        assert len(conversation) == 4
        await screen.pilot.press("escape", "tab", "less_than_sign")
        await screen.until(lambda: "say frist" in screen.says(1))


async def test_escape_leaves_an_edit(show: Show) -> None:
    async with show() as screen:
        await screen.ask("say x")
        await screen.answered()
        screen.column(1).focus()
        await screen.pilot.press("e", "escape")
        assert screen.app.prompt.text == ""
        await screen.ask("say y")
        await screen.answered()
        assert len(screen.column(1).talk.conversation.branch()) == 4


async def test_copying_a_message_and_its_code_blocks(show: Show) -> None:
    async with show() as screen:
        await screen.ask("say look\n```\none\n```\nand\n```py\ntwo\n```")
        await screen.answered()
        screen.column(1).focus()
        await screen.pilot.press("y")
        assert screen.app.clipboard.startswith("look\n```")
        for expected in ("one", "two", "one"):
            await screen.pilot.press("c")
            assert screen.app.clipboard == expected
        await screen.pilot.press("k", "k", "y")
        assert screen.app.clipboard.startswith("say look")


async def test_what_a_model_says_is_text_and_nothing_else(show: Show) -> None:
    async with show() as screen:
        await screen.ask("attack")
        await screen.answered()
        await screen.sees(
            "[b]bold[/b]", "<think>no</think>", "]0;owned", "[31mred", "x (http://b.c)"
        )
        shown = screen.text()
        for obeyed in "\x1b\x07\x9b\u202e":  # 8-bit CSI and right to left among them
            assert obeyed not in shown


async def test_markdown_when_a_block_is_complete_and_lines_stay_lines(show: Show) -> None:
    async with show() as screen:
        await screen.ask("say # Head\n\nroses\nare **red**\n\n* one\n* two")
        await screen.answered()
        shown = screen.says(1).split("Head", 2)[2]
        assert "roses\nare red" in shown
        assert "**" not in shown
        assert " • one" in shown


async def test_wide_and_right_to_left_characters_keep_the_borders(show: Show) -> None:
    async with show(size=(60, 16)) as screen:
        await screen.ask("say 雪の日 👩‍🚀 שלום")
        await screen.answered()
        await screen.sees("雪の日", "שלום")
        from rich.cells import cell_len

        borders = [line for line in screen.lines() if line.startswith("│")]
        assert {cell_len(line) for line in borders} == {60}


async def test_a_failed_answer_is_said_and_can_be_asked_again(show: Show) -> None:
    async with show() as screen:
        await screen.ask("break")
        await screen.until(lambda: "NaN in the logits" in screen.says(1))
        await screen.ask("say better")
        await screen.answered()
        contents = [m.content for m in screen.column(1).talk.conversation]
        assert contents == ["say better", "better"]


async def test_a_prompt_that_is_too_long_is_said_in_its_column(show: Show) -> None:
    async with show() as screen:
        await screen.ask("x" * 5000)
        await screen.until(lambda: "4,096 fit with their answer" in screen.says(1))


async def test_commands_work_on_the_current_column(show: Show) -> None:
    async with show("sql") as screen:
        await screen.ask("/set temperature 0.3")
        await screen.until(lambda: "temperature" in screen.says(1))
        temperatures = [t.chat.settings.params().temperature for t in screen.board.talks]
        assert temperatures == [0.3, 0.7]
        await screen.ask("/nonsense")
        await screen.until(lambda: "no command /nonsense" in screen.notices())
        assert screen.app.prompt.text == "/nonsense"
        await screen.ask("say x")
        await screen.answered()
        await screen.ask("/clear")
        await screen.until(lambda: len(screen.column(1).talk.conversation) == 0)
        assert len(screen.column(2).talk.conversation) == 2


async def test_the_adapter_command_changes_who_answers_in_the_column(show: Show) -> None:
    async with show("sql") as screen:
        await screen.ask("/adapter use sql")
        await screen.sees("1 sql", "2 sql")
        await screen.ask("@1 who?")
        await screen.answered()
        assert "I am sql" in screen.says(1)
        await screen.ask("/adapter use base")
        await screen.sees("1 base", "2 sql")


async def test_another_conversation_in_a_column_is_shown_as_it_is(show: Show) -> None:
    async with show() as screen:
        await screen.ask("say old")
        await screen.answered()
        talk = screen.column(1).talk
        talk.chat.conversation = Conversation()
        talk.say("say new")  # its messages have the same numbers
        await screen.answered()
        await screen.until(lambda: screen.says(1) == "say new\nnew")


async def test_fifty_messages_are_shown_and_the_others_on_request(show: Show) -> None:
    async with show(size=(60, 14)) as screen:
        talk = screen.column(1).talk
        for n in range(40):
            talk.conversation.add("user", f"question {n}")
            talk.conversation.add("assistant", f"answer {n}")
        screen.column(1).rebuild()
        await screen.sees("answer 39")
        assert "question 14\n" not in screen.says(1)
        screen.column(1).focus()
        await screen.pilot.press("g")
        await screen.sees("question 0")
