"""The screen on the real engine with the built-in model and its adapters."""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvrun.chat.history import History
from kvrun.chat.store import Store
from kvrun.cli.tui import local_board
from kvrun.tui.app import TuiApp
from kvrun.tui.themes import Themes
from tests.tui.conftest import Screen


@asynccontextmanager
async def tiny(tmp_path: Path, **sampling: object) -> AsyncIterator[Screen]:
    board = local_board(
        "tiny", None, {"temperature": 0.0, **sampling}, {"threads": 1, "restarts": 0}
    )
    board.store = Store(tmp_path / "chat.db")
    app = TuiApp(board, history=History(None), themes=Themes(None))
    async with app.run_test(size=(150, 40)) as pilot:
        screen = Screen(app, pilot, [])
        screen.patience = 60.0  # a process has to start and read weights
        await screen.until(lambda: board.host.ready)
        yield screen
        await board.settle()
    await board.host.close()


async def test_base_and_adapters_answer_from_one_batch(tmp_path: Path) -> None:
    async with tiny(tmp_path) as screen:
        assert [t.label for t in screen.board.talks] == ["base", "json", "pirate", "sql"]
        await screen.ask("What is the capital of France?")
        await screen.answered()
        base, json, pirate, sql = (talk.last_answer.content for talk in screen.board.talks)
        assert base == "The capital of France is Paris."
        assert json.startswith("{")
        assert "Paris" in pirate
        assert pirate != base
        assert sql.startswith("SELECT")
        tokens = [t.last_answer.meta["completion_tokens"] for t in screen.board.talks]
        stats = await screen.board.host.stats()
        # One by one it would have taken as many steps as there are tokens.
        assert stats.steps < sum(tokens)
        assert stats.generated_tokens >= sum(tokens)


async def test_stopping_frees_the_pages_and_a_killed_engine_comes_back(tmp_path: Path) -> None:
    async with tiny(tmp_path, ignore_eos=True) as screen:
        await screen.ask("Tell me a story about a fox.")
        await screen.until(lambda: all(t.reply and t.reply.tokens > 5 for t in screen.board.talks))
        pages = await screen.board.host.pages()
        assert set(pages.requests) == {talk.request_id for talk in screen.board.talks}
        assert all(pages.requests.values())
        for talk in screen.board.talks:
            talk.stop()
        await screen.answered()
        assert (await screen.board.host.pages()).requests == {}
        said = screen.board.talks[0].last_answer.content
        os.kill(screen.board.host.session.client.pid, signal.SIGKILL)
        await screen.sees("killed by signal 9", "F9 starts it again")
        assert screen.board.talks[0].last_answer.content == said
        await screen.pilot.press("f9")
        await screen.until(lambda: screen.board.host.ready)
        assert list(screen.board.host.adapters) == ["json", "pirate", "sql"]
