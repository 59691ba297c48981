"""Open the screen on a board, and close what it leaves behind."""

import asyncio
import gc
import os

from kvrun.chat.history import History
from kvrun.chat.store import state_folder
from kvrun.errors import KvrunError
from kvrun.tui.app import TuiApp
from kvrun.tui.board import Board
from kvrun.tui.themes import Themes


def show(board: Board, *, demo: bool = False, resume: bool = False) -> None:
    """Run until the user leaves. Raises the error that has kept the engine from starting."""
    # An empty NO_COLOR means nothing, and Textual takes it for a wish.
    no_color = bool(os.environ.get("NO_COLOR"))
    if not no_color:
        os.environ.pop("NO_COLOR", None)
    state = state_folder()
    app = TuiApp(
        board,
        history=History(state / "history"),
        themes=Themes(state / "tui.json"),
        demo=demo,
        resume=resume,
        no_color=no_color,
    )
    # A full collection goes through everything imported and stops the screen for 20 ms and more.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    error = asyncio.run(_run(app, board))
    if error is not None:
        raise error


async def _run(app: TuiApp, board: Board) -> KvrunError | None:
    try:
        return await app.run_async()
    finally:
        await board.settle()
        if board.host:
            await board.host.close()
