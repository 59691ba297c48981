"""Solo or batched: the same questions at once, then one after another; the ratio of the times."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvrun.errors import InvalidRequest
from kvrun.runtime.engine.request import AdapterChoice
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.tui.board import Board
from kvrun.tui.talk import Source

TOKENS = 64


@dataclass(frozen=True)
class Asked:
    """One request of the comparison."""

    source: Source
    messages: list[dict[str, str]]
    params: SamplingParams
    adapter: AdapterChoice


@dataclass(frozen=True)
class Outcome:
    """Seconds and generated tokens of both ways."""

    count: int
    together: float
    alone: float
    tokens_together: int
    tokens_alone: int

    @property
    def ratio(self) -> float:
        """How many times more tokens a second the batch makes."""
        alone = self.tokens_alone / self.alone if self.alone else 0.0
        return (self.tokens_together / self.together) / alone if alone and self.together else 0.0

    def __str__(self) -> str:
        rates = (self.tokens_together / self.together, self.tokens_alone / self.alone)
        return (
            f"solo or batched: {self.count} questions\n"
            f"  in one batch   {self.together:5.2f} s  {rates[0]:6.1f} tok/s\n"
            f"  one by one     {self.alone:5.2f} s  {rates[1]:6.1f} tok/s\n"
            f"  batched is {self.ratio:.1f} × as fast"
        )


def questions(board: Board) -> list[Asked]:
    """The last question of every linked column, with as many tokens for each answer.

    Raises InvalidRequest when fewer than two columns have one.
    """
    asked = []
    for talk in board.talks:
        question = talk.last_question
        if not talk.linked or question is None or not board.local(talk):
            continue
        params = replace(
            talk.chat.settings.params(),
            max_tokens=TOKENS, min_tokens=0, ignore_eos=True, stop=(), seed=1,
        )  # fmt: skip
        messages = [{"role": "user", "content": question.content}]
        asked.append(Asked(talk.source, messages, params, talk.speaker.request))
    if len(asked) < 2:
        raise InvalidRequest("two columns or more have to have a question.", hint="ask something")
    return asked


async def compare(asked: list[Asked], said: Callable[[str], None]) -> Outcome:
    """Run them once to warm the prefix cache, then in one batch, then one by one."""
    said("solo or batched: warming up")
    await asyncio.gather(
        *(_answer(replace(a, params=replace(a.params, max_tokens=1))) for a in asked)
    )
    said(f"solo or batched: {len(asked)} in one batch …")
    began = time.perf_counter()
    together = await asyncio.gather(*(_answer(one) for one in asked))
    middle = time.perf_counter()
    alone = []
    for number, one in enumerate(asked, 1):
        said(f"solo or batched: {number} of {len(asked)} alone …")
        alone.append(await _answer(one))
    end = time.perf_counter()
    return Outcome(len(asked), middle - began, end - middle, sum(together), sum(alone))


async def _answer(asked: Asked) -> int:
    reply = await asked.source.ask(asked.messages, asked.params, asked.adapter)
    async for _ in reply:
        pass
    return reply.tokens
