"""The picture of `kvrun tui`: a real run of the built-in model and its adapters, SVG on stdout.

python docs/tui_picture.py > docs/tui.svg
"""

import asyncio
import sys
import time

from kvrun.chat.history import History
from kvrun.cli.tui import local_board
from kvrun.tui.app import TuiApp
from kvrun.tui.demo import SYSTEM
from kvrun.tui.status import status
from kvrun.tui.themes import Themes

FIRST = ("What is the capital of Portugal?", "Anna is 34 years old and lives in Oslo.")
FIRST += (FIRST[0], "Which customers live in Lisbon?")
THEN = ("Tell me a story about a fox.", "Maria is 27 and works as a nurse in Porto.")
THEN += (THEN[0], "How many products cost more than 100?")


async def main() -> None:
    board = local_board("tiny", None, {"temperature": 0.0}, {}, save=False)
    app = TuiApp(board, history=History(None), themes=Themes(None))
    async with app.run_test(size=(150, 34)) as pilot:

        async def until(true: object) -> None:
            end = time.monotonic() + 60
            while not true():  # type: ignore[operator]
                if time.monotonic() > end:
                    raise SystemExit("it takes too long")
                await pilot.pause(0.02)

        await until(lambda: board.host.ready)
        for talk in board.talks:
            talk.conversation.system = SYSTEM.get(talk.label, "")
        app.prompt.replace_all("@pirate and the capital of Norway?")
        for questions in (FIRST, THEN):
            await until(lambda: not any(talk.busy for talk in board.talks))
            await until(lambda: all(column._live is None for column in app.columns.all))
            for talk, question in zip(board.talks, questions, strict=True):
                talk.say(question)
        await until(lambda: board.talks[0].reply and board.talks[0].reply.tokens > 10)
        app.columns.tick()
        await app._sample()
        app.status.show(status(board, app.pulse, 0, 148))
        sys.stdout.write(app.export_screenshot(title="kvrun tui"))
        await board.settle()
    await board.host.close()


asyncio.run(main())
