"""Beginnings and ends: an engine that dies or never starts, little room, long pastes, the demo."""

from collections.abc import Callable
from typing import Any

import pytest
from textual import events

from kvrun.chat.store import Store
from kvrun.errors import Unsupported

Show = Callable[..., Any]


async def test_the_engine_dies_and_one_key_starts_it_again(show: Show) -> None:
    async with show("sql", "pirate") as screen:
        await screen.ask("say kept")
        await screen.answered()
        screen.engine.die()
        await screen.sees(
            "the engine process has ended", "killed by signal 9", "F9 starts it again"
        )
        assert "kept" in screen.says(1)
        await screen.pilot.press("f9")
        await screen.until(lambda: len(screen.engines) == 2)
        await screen.until(lambda: "F9 starts" not in screen.text())
        assert list(screen.engine.loaded) == ["sql", "pirate"]
        await screen.ask("who?")
        await screen.answered()
        assert "I am pirate" in screen.says(3)
        assert "kept" in screen.says(3)


async def test_the_engine_dies_in_the_middle_of_answers(show: Show) -> None:
    async with show("sql") as screen:
        await screen.ask("die")
        await screen.sees("the engine process has ended", "F9")
        await screen.answered()
        assert "Let me think" in screen.says(1) + screen.says(2)
        await screen.ask("say on")  # a question starts it, too
        await screen.answered()
        assert len(screen.engines) == 2
        assert "on" in screen.says(2)


async def test_an_engine_that_cannot_start_ends_the_screen_with_its_own_words(
    show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tui.conftest import Engine

    monkeypatch.setattr(Engine, "broken", True)
    async with show() as screen:
        await screen.until(lambda: not screen.app.is_running or screen.app.return_value)
    assert isinstance(screen.app.return_value, Unsupported)
    assert "15.2 GB" in str(screen.app.return_value)
    assert screen.app.return_code == 4


async def test_a_question_can_be_typed_while_the_engine_starts(show: Show) -> None:
    async with show() as screen:
        screen.board.host.gate.clear()
        await screen.ask("say early")
        await screen.until(lambda: "engine starts" in str(screen.column(1).border_subtitle))
        screen.board.host.gate.set()
        await screen.answered()
        assert "early" in screen.says(1)


async def test_a_terminal_that_is_too_small_says_so_and_recovers(show: Show) -> None:
    async with show("sql") as screen:
        await screen.ask("say hello")
        await screen.answered()
        await screen.pilot.resize_terminal(30, 10)
        await screen.sees("30×10 cells are too small")
        assert "hello" not in screen.text()
        await screen.pilot.resize_terminal(120, 30)
        await screen.sees("1 base", "2 sql", "hello")
        await screen.until(lambda: screen.app.focused is screen.app.prompt)
        await screen.pilot.press("x")
        assert screen.app.prompt.text == "x"


async def test_resizing_keeps_the_end_in_sight(show: Show) -> None:
    async with show(size=(150, 20)) as screen:
        await screen.ask("say " + "\n\n".join(f"paragraph {n}" for n in range(30)))
        await screen.answered()
        for width in (60, 150):
            await screen.pilot.resize_terminal(width, 20)
            await screen.sees("paragraph 29")
        screen.column(1).scroll_home(animate=False)
        await screen.sees("paragraph 0")
        await screen.pilot.resize_terminal(100, 20)
        await screen.sees("paragraph 0")


async def test_who_scrolls_while_a_resize_is_under_way_stays_there(show: Show) -> None:
    async with show(size=(100, 20)) as screen:
        await screen.ask("say " + "\n\n".join(f"paragraph {n}" for n in range(30)))
        await screen.answered()
        await screen.sees("paragraph 29")
        column = screen.column(1)
        column._laid_out = column.size - (1, 0)  # its lines are those of another size
        column.scroll_home(animate=False, immediate=True)
        column.flow()
        await screen.sees("paragraph 0")


async def test_a_paste_the_model_cannot_take_is_refused(show: Show) -> None:
    async with show() as screen:
        screen.app.prompt.post_message(events.Paste("word " * 40_000))
        await screen.until(lambda: "too long: 200,000 characters" in screen.notices())
        assert "4,096 tokens" in screen.notices()
        assert screen.app.prompt.text == ""


async def test_a_long_paste_is_kept_aside_and_sent_whole(show: Show) -> None:
    async with show(size=(120, 30)) as screen:
        screen.app.prompt.focus()
        await screen.pilot.press(*"say ")
        screen.app.prompt.post_message(events.Paste("x" * 4001))
        await screen.sees("say [pasted 1: 4,001 characters]")
        await screen.pilot.press("enter")
        await screen.until(lambda: screen.column(1).talk.last_question)
        assert screen.column(1).talk.last_question.content == "say " + "x" * 4001
        await screen.until(lambda: "characters more" in screen.says(1))


async def test_history_and_lines_of_the_prompt(show: Show) -> None:
    async with show() as screen:
        for text in ("say one", "say two"):
            await screen.ask(text)
            await screen.answered()
        prompt = screen.app.prompt
        await screen.pilot.press(*"draft", "up")
        assert prompt.text == "say two"
        await screen.pilot.press("up", "up")
        assert prompt.text == "say one"
        await screen.pilot.press("down", "down")
        assert prompt.text == "draft"
        await screen.pilot.press("ctrl+j", "x")
        assert prompt.text == "draft\nx"


async def test_the_prompt_tells_what_could_be_meant(show: Show) -> None:
    async with show("sql") as screen:
        await screen.pilot.press(*"/sys")
        await screen.sees("/system [TEXT]: show or set the system prompt")
        screen.app.prompt.replace_all("@")
        await screen.sees("@all @base @sql")


async def test_the_demo_asks_by_itself_until_a_key_is_pressed(show: Show, store: Store) -> None:
    async with show("sql", demo=True) as screen:
        await screen.until(lambda: all(t.last_answer for t in screen.board.talks))
        first = screen.board.talks[1].conversation
        assert first.system.startswith("Answer with one SQL query")
        await screen.until(lambda: len(screen.engine.requests) >= 4)
        await screen.pilot.press("x")
        await screen.until(lambda: "the columns are yours" in screen.notices())
        assert screen.app.prompt.text == ""  # the key does nothing else
        await screen.answered()
        assert store.saved() == []
        count = len(screen.engine.requests)
        await screen.ask("say mine")
        await screen.answered()
        assert len(screen.engine.requests) == count + 2
        # What a user has asked is kept, what the demo has asked was not.
        await screen.until(lambda: len(store.saved()) == 2)
        assert all("mine" in str(store.load(row.name).to_dict()) for row in store.saved())


async def test_the_latest_conversations_are_gone_on_with(show: Show, store: Store) -> None:
    async with show("sql") as screen:
        await screen.ask("say remember me")
        await screen.answered()
        await screen.until(lambda: len(store.saved()) == 2)
    async with show("sql", resume=True) as screen:
        await screen.until(lambda: "remember me" in screen.says(2))
        assert [t.label for t in screen.board.talks] == ["base", "sql"]


async def test_leaving_in_the_middle_keeps_what_has_come(show: Show, store: Store) -> None:
    async with show() as screen:
        await screen.ask("hang")
        await screen.until(lambda: "think" in screen.says(1))
        await screen.pilot.press("ctrl+q")
        await screen.until(lambda: not screen.app.is_running)
    (saved,) = store.saved()
    assert "Let me think" in store.load(saved.name).branch()[-1].content


async def test_a_disk_that_refuses_is_said_once(show: Show, store: Store) -> None:
    store.path.write_text("no database, whatever the name says" * 50)
    async with show("sql") as screen:
        await screen.ask("say x")
        await screen.answered()
        await screen.until(lambda: "cannot be used" in screen.notices())
        await screen.board.settle()
        assert screen.notices().count("cannot be used") == 1


async def test_ctrl_c_stops_answers_and_then_says_how_to_leave(show: Show) -> None:
    async with show("sql") as screen:
        await screen.ask("hang")
        await screen.until(lambda: "Let me think" in screen.says(2))
        await screen.pilot.press("ctrl+c", "ctrl+c")  # the current column, then all
        await screen.answered()
        await screen.pilot.press("ctrl+c")
        await screen.until(lambda: "^q leaves" in screen.notices())
        assert screen.app.is_running
