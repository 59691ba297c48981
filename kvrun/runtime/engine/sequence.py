"""Sequence: how far one choice of one request has come."""

from collections.abc import Hashable, Iterable, Iterator
from enum import Enum
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from kvrun.runtime.engine.request import Image, Logprob, Request

if TYPE_CHECKING:
    from kvrun.runtime.engine.seen import Seen
    from kvrun.runtime.lora.resident import Adapter

SCORED_AT_ONCE = 256  # rows of logits; a vocabulary of 150,000 makes each 600 kB


class Source(NamedTuple):
    """What a decoder attends to beside its own tokens: a prompt that an encoder reads, or an image.

    It takes so many rows of the cache; equal ones have one `key`.
    """

    key: Hashable
    rows: int
    ids: list[int] | None = None
    image: Image | None = None


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Known tokens, scheduled positions, block table.

    `tokens` are those the host knows. `in_flight` more have been sampled by steps that have not
    landed, so the sequence is `length` long although its last ids may still be on the device only.
    `scheduled` positions have been handed to the runner; the rest of `length` is work to do.
    With an encoder, `tokens` and lengths are the decoder's. `sources` are read before
    its first row.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        seed: int,
        max_length: int,
        root: bytes,
        adapter: "Adapter | None" = None,
        known: Iterable[int] = (),
        seen: "Seen | None" = None,
        start_id: int | None = None,
    ) -> None:
        self.request = request
        self.index = index  # which of the request's choices
        self.seed = seed
        self.max_length = max_length  # prompt and generated tokens together
        self.pooling = request.pooling
        self.seen = seen  # the images of its prompt
        # The device can go on without the host.
        self.plain = request.params.plain and not request.pooling
        # An encoder reads the prompt, and the answer starts from `start_id`; or it goes on from it.
        self.encoded = start_id is not None
        self.sources = seen.sources if seen is not None else []
        if self.encoded:
            ids = list(request.prompt_ids)
            self.sources = [Source(tuple(ids), len(ids), ids=ids)]
        self.source_blocks: list[list[int]] = []  # where keys and values of each lie
        self.source_hits: list[bool] = []  # another sequence had it read
        self.begun = 0  # where its first row is
        self.tokens = list(request.prompt_ids) if start_id is None else [start_id]
        self.prompt_len = len(self.tokens)
        # It goes on from there as if it had been preempted.
        self.tokens += known
        self.resumed = len(self.tokens) > self.prompt_len
        self.state = State.WAITING
        self.scheduled = 0
        self.in_flight = 0
        self.open_tickets = 0
        self.draining = False  # preempted or finished; blocks go when the last ticket has landed
        self.failed = False
        self.slot = -1  # row of the runner's state on the device
        self.blocks: list[int] = []
        self.adapter = adapter
        self.pinned = False  # the adapter keeps its place on the device until this one has ended
        self.keys = [root]  # the prefix-cache key behind each full block, the root first
        self.hit_blocks = 0  # how many of `blocks` came from the prefix cache or a sibling
        self.hit_tokens: int | None = None  # prompt tokens found cached when it first started
        self.prompt_logprobs: list[Logprob] = []  # of the prompt's tokens from the second on
        self.choices: list[Sequence] = [self]  # all of its request

    @property
    def all_blocks(self) -> list[int]:
        """Every block that it owns, or shares."""
        return [*chain(*self.source_blocks), *self.blocks]

    @property
    def own_blocks(self) -> list[int]:
        """Those that it has written."""
        read = (blocks for _, blocks in self.unread)
        return [*chain(*read), *self.blocks[self.hit_blocks :]]

    @property
    def unread(self) -> Iterator[tuple[Source, list[int]]]:
        """The sources that it has read itself, and where."""
        for source, blocks, hit in zip(
            self.sources, self.source_blocks, self.source_hits, strict=False
        ):
            if not hit:
                yield source, blocks

    def source_key(self, source: Source) -> tuple[str, Hashable]:
        """Its request, and what keys and values of a source depend on."""
        return self.request.id, (self.adapter.identity if self.adapter else None, source.key)

    def runs(self, start: int, count: int) -> list[tuple[int, int | None]]:
        """Its rows from `start` on by what they attend to: (how many, which of `sources`)."""
        if self.seen is not None:
            return self.seen.runs(start, start + count)
        return [(count, 0 if self.sources else None)]

    @property
    def length(self) -> int:
        return len(self.tokens) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 0 when nothing is to be done."""
        if self.length >= self.max_length:
            return 0
        return self.length - self.scheduled

    @property
    def chunk(self) -> int:
        """How many tokens one step may take on; where each brings logits home, not too many."""
        return min(self.remaining, SCORED_AT_ONCE) if self.unscored else self.remaining

    @property
    def unscored(self) -> bool:
        """Whether tokens of the prompt still lack a log-probability that was asked for."""
        return len(self.prompt_logprobs) < self.scored(0, self.prompt_len)

    def scored(self, start: int, count: int) -> int:
        """How many of `count` tokens from `start` tell the log-probability of a prompt's token.

        The first choice does so for all of its request, and has done so before its first token.
        """
        if self.index or self.resumed or self.request.params.prompt_logprobs is None:
            return 0
        return max(0, min(count, self.prompt_len - 1 - start))

    def named(self, start: int, stop: int) -> list[int]:
        """Its known tokens, by what names their content: of an image, more than its places say."""
        if self.seen is None:
            return self.tokens[start:stop]
        return self.seen.named(self.tokens, start, stop)

    @property
    def told_logprobs(self) -> list[Logprob] | None:
        """Those of the prompt, where they were asked for and are all there."""
        asked = self.request.params.prompt_logprobs is not None and not self.index
        return self.prompt_logprobs if asked and self.generated else None

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def leader(self) -> "Sequence":
        """The choice that computes the prompt, whose blocks the others share: the first alive."""
        return next((s for s in self.choices if s.state is not State.FINISHED), self)

    def until_end(self, drawn: list[int], eos: frozenset[int]) -> tuple[str | None, list[int]]:
        """Why it ends among `drawn`, and the tokens up to its end."""
        params, known = self.request.params, len(self.tokens)
        for count, token_id in enumerate(drawn, 1):
            ends = token_id in eos and not params.ignore_eos
            if ends or token_id in params.stop_token_ids:
                generated = known + count - self.prompt_len
                if generated > params.min_tokens or not params.min_tokens:
                    return "stop", drawn[:count]
            if known + count >= self.max_length:
                return "length", drawn[:count]
        return None, drawn

    def place(self, known: list[int], keys: list[bytes], more: list[int], block_size: int) -> None:
        """Begin behind `known` blocks, which hold its first tokens and have these keys."""
        self.blocks = known + more
        self.keys += keys
        self.hit_blocks = len(known)
        self.scheduled = self.begun = len(known) * block_size

    @property
    def found(self) -> int:
        """Tokens of the prompt that it need not compute, as it begins."""
        read = self.encoded and self.source_hits[0]
        return self.sources[0].rows if read else self.begun

    def restart(self) -> None:
        """Forget everything computed; the tokens stay and are computed again."""
        self.scheduled = 0
        self.blocks = []
        self.source_blocks, self.source_hits = [], []
        del self.keys[1:]
        self.hit_blocks = 0
        self.slot = -1
        self.draining = False
