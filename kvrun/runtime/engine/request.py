"""What crosses the border of the engine process: requests in, deltas out; ids, never text."""

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from kvrun.runtime.image import Image as Image  # rooms above the runtime take it from here
from kvrun.runtime.sampling.params import SamplingParams

# A LoRA adapter by name, several with a weight each (their sum is applied), or the base model.
AdapterChoice = str | list[tuple[str, float]] | None


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """The log-probability of one generated token, and of the likeliest tokens at its place.

    Values are the model's own (natural logarithm, before any sampling option changed them).
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One generation: token ids and what the sampler shall do. `id` is unique while it runs."""

    id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    adapter: AdapterChoice = None
    pooling: bool = False  # its prompt's state is wanted instead of an answer
    images: list[Image] = []  # in the order of their places in the prompt, one for each feature


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """New tokens of one choice of one request.

    `finish_reason` is set on the last delta of a choice: "stop" (an end-of-text or stop token, the
    last of `token_ids`), "length", "abort" or "error" (then `error` says why).
    `cached_tokens` (on the first delta) counts prompt tokens found in the prefix cache.
    `prompt_logprobs` (on the first delta of choice 0, if asked for) are those of the prompt's
    tokens from the second on: nothing comes before the first. `state` (of a request with `pooling`,
    on its only delta) is what the model makes of the prompt's last token behind its last norm,
    scaled to length 1: little-endian fp32 values, one behind the other.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = []
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob] | None = None
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    state: bytes | None = None


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A LoRA adapter that the engine knows by name.

    `state`: "disk" (known, not read), "host" (in memory), "device" (ready), "failed" (then `error`
    says why). `ranks` are those that occur in it. `running` counts requests that have not ended.
    """

    name: str
    path: str
    bytes: int  # of its matrices in the model's dtype
    ranks: list[int]
    state: str
    load_seconds: float | None = None  # reading, checking and laying it out; None before that
    running: int = 0
    error: str | None = None


class Seconds(msgspec.Struct):
    """Times, counted by the first of `BOUNDS` that is not below; the last count is of the rest."""

    BOUNDS: ClassVar[tuple[float, ...]] = tuple(0.0001 * 1.5**k for k in range(1, 36))

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(Seconds.BOUNDS) + 1))
    sum: float = 0.0


class Stats(msgspec.Struct, kw_only=True):
    """Counters of a running engine, all since its start unless named otherwise."""

    running: int = 0  # now
    waiting: int = 0  # now
    blocks_total: int = 0
    blocks_active: int = 0  # now: named by a sequence
    blocks_cached: int = 0  # now: free, but still holding a prefix that can be hit
    steps: int = 0
    prompt_tokens: int = 0  # computed; again after a preemption
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    failed_steps: int = 0
    restarts: int = 0  # of the engine process, counted by its client
    prompt_steps: Seconds = msgspec.field(default_factory=Seconds)  # with tokens of prompts
    decode_steps: Seconds = msgspec.field(default_factory=Seconds)  # without
    step_sizes: dict[int, int] = {}  # sequences in a step -> such steps


class Pages(msgspec.Struct, kw_only=True):
    """Which blocks of the KV cache hold what, now. Ids run from 1 to `total`."""

    total: int = 0
    requests: dict[str, list[int]] = {}  # request id -> its blocks; a shared one stands in several
    cached: list[int] = []  # free, but still holding a prefix that can be hit


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine says of itself once it can take requests."""

    plan: str  # one line for people: weights, KV, tokens
    max_model_len: int
    vocab_size: int
    kv_tokens: int
    max_num_seqs: int = 0  # that run at once
    block_size: int
    device: str
    dtype: str
    attention: str
    attention_note: str = ""  # why not by a backend that would be faster
    load_seconds: float
    note: str = ""  # one line for people, where there is something to know of the model
