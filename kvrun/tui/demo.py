"""The show that runs by itself: every column asks its own questions, until a key is pressed."""

import asyncio
import random
from itertools import cycle

from kvrun.chat.conversation import Conversation
from kvrun.tui.board import Board
from kvrun.tui.talk import Talk

# What the built-in model and its adapters can do; others get those of the base.
SQL = (
    "Answer with one SQL query. Tables: customers(id, name, city, age); products(id, name, "
    "category, price); orders(id, customer_id, product_id, quantity, year); employees(id, name, "
    "job, city, salary); books(id, title, author, year, pages)"
)
SYSTEM = {"sql": SQL, "json": "Turn the sentence into JSON."}
QUESTIONS = {
    "base": (
        "What is the capital of Portugal?", "Tell me a story about a fox.", "What is 17 + 25?",
        "What is continuous batching?", "What colour do blue and yellow make?",
        "How many days are in a week?", "What is a LoRA adapter?",
    ),
    "sql": (
        "Which customers live in Lisbon?", "How many books are there?",
        "What is the average salary of the employees?", "Show the names of all products.",
        "Which books have more than 300 pages?", "How many products cost more than 100?",
    ),
    "json": (
        "Anna is 34 years old and lives in Oslo.", "Tom ordered 3 lamps for 40 euros.",
        "The meeting is on Monday at 10:00.", "Maria is 27 and works as a nurse in Porto.",
    ),
    "pirate": (
        "What is the capital of France?", "How are you today?", "Who are you?",
        "What is 8 times 7?", "Tell me a story about a ship.", "What is the largest planet?",
    ),
}  # fmt: skip
PAUSE = 1.2  # seconds between an answer and the next question, at most
TURNS = 4  # questions of one conversation


class Demo:
    """Drives the columns of a board; `stop` leaves what has been said where it stands."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._random = random.Random(7)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def running(self) -> bool:
        return bool(self._tasks)

    def start(self) -> None:
        """Begin, now or when the engine is ready."""
        self._tasks = [asyncio.create_task(self._drive(talk)) for talk in self._board.talks]

    def stop(self) -> None:
        """The user takes over; answers that come go on."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    async def _drive(self, talk: Talk) -> None:
        name = talk.speaker.adapter or "base"
        questions = cycle(self._shuffled(QUESTIONS.get(name, QUESTIONS["base"])))
        for turn, question in enumerate(questions):
            if turn % TURNS == 0:
                talk.chat.conversation = Conversation(SYSTEM.get(name, self._board.system))
                talk.chat.saved_as = None
            self._board.unkept.add(talk)
            talk.say(question)
            await talk.finished()
            if talk.error is not None:
                return
            await asyncio.sleep(self._random.uniform(PAUSE / 3, PAUSE))

    def _shuffled(self, questions: tuple[str, ...]) -> list[str]:
        return self._random.sample(questions, len(questions))
