"""Engine: the step loop. Requests in, deltas out; one bad request never takes others with it."""

import random
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvrun.errors import EngineDead, InvalidRequest
from kvrun.runtime.engine.request import AdapterInfo, Delta, Pages, Ready, Request, Stats
from kvrun.runtime.engine.scheduler import Row, Schedule, Scheduler
from kvrun.runtime.engine.seen import look
from kvrun.runtime.engine.sequence import Sequence, Source
from kvrun.runtime.engine.times import StepTimes
from kvrun.runtime.lora.bank import LoraBank
from kvrun.runtime.lora.resident import Adapter
from kvrun.runtime.text.places import Places

if TYPE_CHECKING:
    from kvrun.runtime.engine.ticket import Ticket

# So many steps in a row that fail for everybody, and the engine gives up.
MAX_BAD_STEPS = 3
# Seconds that a step with nothing to compute waits for an adapter: as long as nobody asks anything.
PATIENCE = 0.002


class Runner(Protocol):
    """What the engine asks of a ModelRunner; tests put a scripted one in its place."""

    def submit(self, schedule: Schedule) -> "Ticket": ...

    def probe(self) -> None: ...

    def clear(self, blocks: list[int]) -> None: ...


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    vocab_size: int
    max_model_len: int
    places: Places | None = None  # those of images, of a model that sees them
    start_id: int | None = None  # what an answer starts from where an encoder reads the prompt


class Engine:
    """Up to `run_ahead` steps are submitted beyond the one whose tokens are being awaited."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        limits: Limits,
        *,
        ready: Ready,
        seed: int = 0,
        run_ahead: int = 0,
        bank: LoraBank | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._bank = bank
        self.ready = ready
        self._runner = runner
        self._limits = limits
        self._random = random.Random(seed)
        self._run_ahead = run_ahead
        self._open: deque[Ticket] = deque()
        self._begun: deque[float] = deque()  # when each of them was submitted
        self._times = StepTimes(scheduler.stats)
        self._choices: dict[str, int] = {}  # request id -> choices that have not ended
        self._bad_steps = 0

    def add(self, request: Request, known: Mapping[int, list[int]] | None = None) -> None:
        """Queue a request; `known` as in wire.Submit.

        Raises InvalidRequest for one that can never be served.
        """
        if request.id in self._choices:
            raise InvalidRequest(f"a request with the id '{request.id}' is running already.")
        max_length = self._admissible_length(request)
        adapter, seen = self._adapter(request), look(request, self._limits.places)
        max_length = self._beside(seen.sources if seen else [], request, max_length)
        params = request.params
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        prefix = self.scheduler.prefix
        # Where the chain of an adapter starts is known once its content is.
        root = prefix.root(None) if prefix and adapter is None else b""
        known = {index: [] for index in range(params.n)} if known is None else known
        options: Any = {"seed": seed, "max_length": max_length, "root": root, "adapter": adapter}
        options |= {"seen": seen, "start_id": self._limits.start_id}
        sequences = [Sequence(request, index, known=t, **options) for index, t in known.items()]
        for sequence in sequences:
            sequence.choices = sequences
            if self._bank and adapter:
                self._bank.claim(adapter)
            self.scheduler.add(sequence)
        self._choices[request.id] = len(sequences)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its choices; what has ended a moment ago is ignored."""
        self.scheduler.abort(request_id, index)

    def load_adapter(self, name: str, path: str) -> "Future[AdapterInfo]":
        """Begin to read an adapter; `step` must be called until the future is done.

        Its exception is a KvrunError: what cannot be served, and why.
        """
        answer: Future[AdapterInfo] = Future()

        def pass_on(loaded: "Future[Adapter]") -> None:
            if error := loaded.exception():
                answer.set_exception(error)
            else:
                answer.set_result(_info(loaded.result()))

        self._lora.load(name, path).add_done_callback(pass_on)
        return answer

    def register_adapter(self, name: str, path: str) -> None:
        """Know an adapter by its headers, as those of the configuration. Raises KvrunError."""
        self._lora.register(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises InvalidRequest if it is unknown or a request is using it."""
        self._lora.unload(name)

    def adapters(self) -> list[AdapterInfo]:
        """The adapters that are known, in the order in which they came."""
        return [_info(adapter) for adapter in self._bank.adapters] if self._bank else []

    @property
    def idle(self) -> bool:
        loading = self._bank is not None and self._bank.loading
        return self.scheduler.idle and not self._open and not loading

    def stats(self) -> Stats:
        """The counters as they are now."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        stats = scheduler.stats
        stats.running, stats.waiting = len(scheduler.running), len(scheduler.waiting)
        stats.blocks_active = pool.total - pool.free
        stats.blocks_cached = pool.kept
        return deepcopy(stats)

    def pages(self) -> Pages:
        """Whose blocks are whose, as they are now."""
        scheduler = self.scheduler
        requests: dict[str, dict[int, None]] = {}
        for sequence in [*scheduler.running, *scheduler.leaving]:
            requests.setdefault(sequence.request.id, {}).update(dict.fromkeys(sequence.all_blocks))
        return Pages(
            total=scheduler.pool.total,
            requests={name: list(blocks) for name, blocks in requests.items()},
            cached=scheduler.pool.kept_blocks(),
        )

    def step(self) -> list[Delta]:
        """Submit what can be submitted, take in the oldest step, return what it has brought.

        Raises EngineDead when steps keep failing with no request to blame.
        """
        if self._bank and self._bank.loading:
            self._bank.poll()
        deltas = self.scheduler.take_deltas()
        schedule: Schedule = []
        while self._ahead() <= self._run_ahead and (schedule := self.scheduler.schedule()):
            if spoilt := self.scheduler.take_spoilt():
                self._runner.clear(spoilt)
            if not self._submit(schedule):
                break
        if self._bank and self._bank.loading and not self._open:
            self._bank.wait(PATIENCE)
        while self._open:
            drawn = self._open[0].read()
            ticket = self._open.popleft()
            self._times.took(ticket.schedule, self._begun.popleft())
            deltas += self.scheduler.commit(ticket.schedule, drawn)
            if self._ahead() <= self._run_ahead:
                break
        deltas += self.scheduler.take_deltas()
        for delta in deltas:
            if delta.finish_reason:
                self._ended(delta.request_id)
        return deltas

    def _ahead(self) -> int:
        """Steps that have been submitted and not taken in."""
        return sum(ticket.schedule[0].turns for ticket in self._open)

    # -- admission --------------------------------------------------------------------------

    def _admissible_length(self, request: Request) -> int:
        """Prompt and generated tokens together, once the request is known to be servable."""
        count, limit = len(request.prompt_ids), self._limits.max_model_len
        if count == 0:
            raise InvalidRequest("the prompt is empty.", hint="give at least one token")
        if count >= limit:
            raise InvalidRequest(
                f"the prompt has {count:,} tokens; the context holds {limit:,}, the answer "
                "included.",
                hint="shorten the prompt, or start with a larger max_model_len if the model and "
                "the memory allow it",
            )
        ends = min(request.prompt_ids), max(request.prompt_ids)
        wrong = next((i for i in ends if not 0 <= i < self._limits.vocab_size), None)
        if wrong is not None:
            raise InvalidRequest(
                f"token id {wrong} is outside the vocabulary of {self._limits.vocab_size:,}."
            )
        request.params.check_vocabulary(self._limits.vocab_size)
        if request.pooling and (request.params.n > 1 or request.params.prompt_logprobs is not None):
            raise InvalidRequest("a request with pooling has no choices and no prompt_logprobs.")
        asked = request.params.max_tokens
        encoded = self._limits.start_id is not None
        if encoded and (request.pooling or request.params.prompt_logprobs is not None):
            raise InvalidRequest(
                "this model has no log-probabilities and no embedding of a prompt.",
                cause="the prompt is read by an encoder, which predicts none of its tokens and "
                "has no state that stands for all of it",
                hint="leave out prompt_logprobs and pooling",
            )
        # A decoder behind an encoder starts from one token.
        shift = 1 - count if encoded else 0
        if asked is None:
            return limit + shift
        if count + asked > limit:
            raise InvalidRequest(
                f"{count:,} prompt tokens and max_tokens={asked:,} make {count + asked:,}; the "
                f"context holds {limit:,}.",
                hint=f"max_tokens={limit - count:,} fits",
            )
        return count + asked + shift

    def _beside(self, images: list[Source], request: Request, max_length: int) -> int:
        """`max_length`, or less where that has no room beside images, which take room of their
        own."""
        size = self.ready.block_size
        taken = sum(-(-image.rows // size) for image in images)
        room = (self.scheduler.pool.total - taken) * size
        if not taken or max_length <= room:
            return max_length
        count, asked = len(request.prompt_ids), request.params.max_tokens
        if asked is None and count < room:
            return room
        raise InvalidRequest(
            f"the images take {taken * size:,} tokens of a cache that has "
            f"{self.scheduler.pool.total * size:,}; {count + (asked or 1):,} of prompt and answer "
            "have no room beside them.",
            hint="fewer images, a shorter prompt or answer, or more kv_memory",
        )

    @property
    def _lora(self) -> LoraBank:
        if self._bank is None:
            raise InvalidRequest("this engine takes no adapters.")
        return self._bank

    def _adapter(self, request: Request) -> Adapter | None:
        """What the request names; never the base model for a name that is not known."""
        return None if request.adapter is None else self._lora.find(request.adapter)

    def _ended(self, request_id: str) -> None:
        self._choices[request_id] -= 1
        if self._choices[request_id] == 0:
            del self._choices[request_id]

    # -- steps that raise -------------------------------------------------------------------

    def _submit(self, schedule: Schedule) -> bool:
        """Whether the step went well as a whole."""
        begun = self._times.now()
        try:
            self._open.append(self._runner.submit(schedule))
            self._begun.append(begun)
        except MemoryError as error:
            self.scheduler.stats.failed_steps += 1
            if self.scheduler.shrink():
                for row in schedule:
                    self.scheduler.undo(row)
            else:
                self._isolate(schedule, error)
            return False
        except EngineDead:  # no step can go well in this process any more
            raise
        except Exception as error:
            self.scheduler.stats.failed_steps += 1
            self._isolate(schedule, error)
            return False
        except BaseException:  # Ctrl+C: as if the step had not been tried
            for row in schedule:
                self.scheduler.undo(row)
            raise
        self._bad_steps = 0
        return True

    def _isolate(self, schedule: Schedule, error: Exception) -> None:
        """Retry a failed step in halves until the rows that are to blame stand alone.

        Retrying is safe: the same tokens write the same cache slots again.
        """
        tickets: list[Ticket] = []
        guilty: list[tuple[Row, Exception]] = []
        _bisect(self._runner.submit, schedule, error, tickets, guilty)
        self._open.extend(tickets)
        self._begun.extend([self._times.now()] * len(tickets))
        if len(guilty) == len(schedule) and not self._healthy():
            self._bad_steps += 1
            for row, _ in guilty:
                self.scheduler.undo(row)
            if self._bad_steps >= MAX_BAD_STEPS:
                raise EngineDead(
                    f"{MAX_BAD_STEPS} steps in a row have failed.", cause=describe(error)
                ) from error
            return
        self._bad_steps = 0
        for row, cause in guilty:
            self.scheduler.undo(row)
            self.scheduler.fail(row.sequence, describe(cause))

    def _healthy(self) -> bool:
        """Whether the model still runs at all, so that failing rows are to blame themselves."""
        try:
            self._runner.probe()
        except Exception:
            return False
        return True


def _info(adapter: Adapter) -> AdapterInfo:
    return AdapterInfo(
        name=adapter.name,
        path=str(adapter.source.path),
        bytes=adapter.bytes,
        ranks=list(adapter.source.layout.ranks),
        state=adapter.state,
        load_seconds=adapter.load_seconds,
        running=adapter.users,
        error=adapter.error.in_one_line if adapter.error else None,
    )


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _bisect(
    submit: Callable[[Schedule], "Ticket"],
    schedule: Schedule,
    error: Exception,
    tickets: "list[Ticket]",
    guilty: list[tuple[Row, Exception]],
) -> None:
    """`schedule` has raised `error`: sort its rows into tickets that went well and guilty rows."""
    if len(schedule) == 1:
        guilty.append((schedule[0], error))
        return
    middle = len(schedule) // 2
    for half in (schedule[:middle], schedule[middle:]):
        try:
            tickets.append(submit(half))
        except EngineDead:
            raise
        except Exception as half_error:
            _bisect(submit, half, half_error, tickets, guilty)
