"""EngineConfig: everything that is fixed when an engine starts."""

import math
from dataclasses import dataclass, field

from kvrun.errors import InvalidRequest

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "fp8")
LOAD_FORMATS = ("auto", "dummy")
# How matrices may be rounded as they are read, and other names for the same.
QUANTIZE = ("int8", "int4", "nf4", "fp4", "fp8")
METHODS = ("int8", "int4", "gptq", "awq", "nf4", "fp8")  # of `kvrun quantize`
STORED = ("awq", "compressed-tensors", "exl2", "gptq", "marlin")  # what else others name so
QUANTIZE_ALIASES = {
    "eetq": "int8", "bitsandbytes": "int8",
    "bitsandbytes-nf4": "nf4", "bitsandbytes-fp4": "fp4",
}  # fmt: skip

_SIZES = (
    "max_num_seqs", "max_num_batched_tokens", "block_size", "max_model_len", "threads", "kv_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What `LLM`, `EngineClient` and the commands start an engine with.

    `kv_memory` is bytes (an int above 1) or a fraction of the memory that is free after the
    weights are read (a float in (0, 1]); None takes a default by device. `None` sizes are chosen
    from the model and the machine. `run_ahead` is how many steps are submitted beyond the one whose
    tokens are awaited; None: 0 on CPU, 4 on CUDA. A step longer than `step_timeout` seconds ends
    the engine process. One that has ended by itself is started again by its client, `restarts`
    times in a row; an end is forgotten after ten minutes. `adapters` are LoRA adapters, name ->
    PEFT folder; those that are in use lie in `lora_memory` of the device, bytes or a fraction as
    `kv_memory`.
    """

    model: str  # a local folder with config.json
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None  # one of QUANTIZE or QUANTIZE_ALIASES; the head gets 8 bits
    attention: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None  # at once; None: by the device's memory
    max_num_batched_tokens: int | None = None  # None: by device
    block_size: int | None = None  # tokens of a block of the KV cache; None: by device
    kv_dtype: str = "auto"  # "fp8" halves the KV cache at some loss of accuracy
    kv_memory: int | float | None = None
    kv_tokens: int | None = None  # the same in tokens
    adapters: dict[str, str] = field(default_factory=dict)
    lora_memory: int | float | None = None
    prefix_caching: bool = True
    seed: int = 0
    load_format: str = "auto"
    threads: int | None = None  # torch threads on CPU; None: as many as a step is worth
    run_ahead: int | None = None
    cuda_graphs: bool = True
    fallback: bool = True  # transformers' code for architectures without a family here
    # A long prompt of a large model takes minutes on a CPU; nothing honest takes longer than this.
    step_timeout: float = 600.0
    restarts: int = 3

    def __post_init__(self) -> None:
        _one_of("device", self.device.split(":")[0], DEVICES)
        _one_of("dtype", self.dtype, DTYPES)
        if self.quantize is not None:
            if self.quantize in STORED:
                raise InvalidRequest(
                    f"quantize is '{self.quantize}', which nothing is rounded to as it is read.",
                    hint="leave it out: of a model that is stored so the format is found",
                )
            _one_of("quantize", self.quantize, (*QUANTIZE, *QUANTIZE_ALIASES))
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
        for name in _SIZES:
            if getattr(self, name) is not None:
                _at_least_one(name, getattr(self, name))
        for name in ("kv_memory", "lora_memory", "step_timeout"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise InvalidRequest(f"{name} is {value}; it must be above 0.")
        if self.kv_memory is not None and self.kv_tokens is not None:
            raise InvalidRequest(
                "kv_memory and kv_tokens say the same in two ways.", hint="give one of them"
            )
        for name in ("run_ahead", "restarts"):
            count = getattr(self, name)
            if count is not None and count < 0:
                raise InvalidRequest(f"{name} is {count}; it must be at least 0.")

    @property
    def rounding(self) -> str | None:
        """`quantize` by its own name."""
        return self.quantize and QUANTIZE_ALIASES.get(self.quantize, self.quantize)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidRequest(f"{name} is '{value}'.", hint=f"one of: {', '.join(known)}")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InvalidRequest(f"{name} is {value}; it must be at least 1.")
