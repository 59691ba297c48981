"""Ticket: a submitted step, and its tokens once they have arrived."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvrun.runtime.engine.faults import of_device
from kvrun.runtime.engine.request import Logprob
from kvrun.runtime.engine.scheduler import Drawn, Schedule
from kvrun.runtime.sampling.sampler import Logprobs, Sampled


@dataclass
class Ticket:
    """A submitted step. `read` waits for its tokens, and not for steps submitted after it."""

    schedule: Schedule
    sampled: (
        Sampled | None
    )  # ids and finite [turns, S] or [S]; on their way to the host when `landed` is there
    landed: torch.cuda.Event | None = None

    @classmethod
    def of(cls, schedule: Schedule, sampled: Sampled | None) -> "Ticket":
        """A ticket whose tokens set out for the host now: later steps reuse their memory."""
        if sampled is None:
            return cls(schedule, None)
        sent = Sampled(
            _send(sampled.ids),
            _send(sampled.finite),
            _send_all(sampled.logprobs),
            _send_all(sampled.prompt),
            None if sampled.states is None else _send(sampled.states),
        )
        anything = sampled.ids if sampled.prompt is None else sampled.prompt[0]
        anything = anything if sampled.states is None else sampled.states
        if not anything.is_cuda:
            return cls(schedule, sent)
        landed = torch.cuda.Event()  # type: ignore[no-untyped-call]
        landed.record()
        return cls(schedule, sent, landed)

    def read(self) -> list[Drawn | None]:
        """What each row of the schedule has drawn; None for rows that have nothing to say."""
        drawn: list[Drawn | None] = [None] * len(self.schedule)
        if self.sampled is None:
            return drawn
        if self.landed is not None:
            with of_device():
                self.landed.synchronize()
        wanted = [i for i, row in enumerate(self.schedule) if row.sample]
        shape = self.schedule[0].turns, len(wanted)
        columns = self.sampled.ids.view(shape).t().tolist()
        finite = self.sampled.finite.view(shape).t()
        logprobs = self._logprobs(columns)
        broken = {} if bool(finite.all()) else _broken(finite)
        for place, index in enumerate(wanted):
            ids = columns[place]
            end = broken.get(place, len(ids))
            drawn[index] = Drawn(ids[:end], place not in broken, logprobs[place])
        if self.sampled.prompt is not None:
            self._add_prompts(drawn, self.sampled.prompt)
        if self.sampled.states is not None:
            pools = [index for index, row in enumerate(self.schedule) if row.pools]
            for index, state in zip(pools, self.sampled.states.numpy(), strict=True):
                sound = bool(np.isfinite(state).all())
                drawn[index] = Drawn([], sound, state=state.astype("<f4").tobytes())
        return drawn

    def _add_prompts(self, drawn: list[Drawn | None], prompt: Logprobs) -> None:
        """Hand out the log-probabilities of prompts to the rows that have computed them."""
        chosen, top_ids, top = (tensor.tolist() for tensor in prompt)
        at = 0
        for index, row in enumerate(self.schedule):
            sequence = row.sequence
            scored = sequence.scored(row.start, row.count)
            if not scored:
                continue
            count = sequence.request.params.prompt_logprobs
            entries = []
            for place in range(at, at + scored):
                token = sequence.tokens[row.start + 1 + place - at]
                pairs = list(zip(top_ids[place][:count], top[place][:count], strict=True))
                entries.append(Logprob(token, chosen[place], pairs))
            at += scored
            drawn[index] = (drawn[index] or Drawn([]))._replace(prompt=entries)

    def _logprobs(self, ids: list[list[int]]) -> Sequence[Logprob | None]:
        if self.sampled is None or self.sampled.logprobs is None:
            return [None] * len(ids)
        chosen, top_ids, top = (tensor.tolist() for tensor in self.sampled.logprobs)
        found: list[Logprob | None] = []
        for place, row in enumerate(row for row in self.schedule if row.sample):
            count = row.sequence.request.params.logprobs
            if count is None:
                found.append(None)
                continue
            pairs = list(zip(top_ids[place][:count], top[place][:count], strict=True))
            found.append(Logprob(ids[place][0], chosen[place], pairs))
        return found


def _broken(finite: torch.Tensor) -> dict[int, int]:
    """finite [S, turns] -> rows that are not finite throughout, and their first turn that is not"""
    return {place: row.index(False) for place, row in enumerate(finite.tolist()) if False in row}


def _send_all(tensors: Logprobs | None) -> Logprobs | None:
    return None if tensors is None else (_send(tensors[0]), _send(tensors[1]), _send(tensors[2]))


def _send(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the host, pinned if it comes there; complete once the stream is so far."""
    return tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor
