"""Plan: what a model takes of this machine's memory, how much context fits, and why."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from kvrun.errors import Unsupported
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.tensorfile import TensorFolder

# On CPU the memory belongs to the user's other programs too.
CPU_KV_FRACTION = 0.25


@dataclass(frozen=True)
class Plan:
    """Bytes of weights and cache, and the longest context they leave room for."""

    weight_bytes: int
    kv_bytes_per_block: int
    num_blocks: int  # block 0, the padding, included
    block_size: int
    max_model_len: int

    @property
    def kv_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.kv_bytes_per_block

    def line(self) -> str:
        """One line for people."""
        return (
            f"weights {size(self.weight_bytes)}, KV {size(self.kv_bytes)} = {self.kv_tokens:,} "
            f"tokens, context {self.max_model_len:,}"
        )


def size(count: int) -> str:
    """Bytes in the unit a person would use: 14.7 MB, 2.1 GB."""
    for unit, power in (("TB", 4), ("GB", 3), ("MB", 2), ("kB", 1)):
        if count >= 1000**power:
            value = count / 1000**power
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{count} B"


def make_plan(
    *,
    weight_bytes: int,
    kv_bytes_per_block: int,
    free_bytes: int,
    on_cpu: bool,
    kv_memory: int | float | None,
    block_size: int,
    max_num_seqs: int,
    max_position: int,
    max_model_len: int | None,
    tables: int = 1,
) -> Plan:
    """Size the KV cache and the context from what is free once the weights are in memory.

    An unset context is what the model was made for, or less when less fits. `tables`: in so many
    pieces a sequence lies, each of which may leave a part of a block empty. Raises Unsupported
    when a context that was asked for cannot be kept or is more than the model was made for, or
    when there is no room for a single block.
    """
    wanted = max_model_len or max_position
    if wanted > max_position:
        raise Unsupported(
            f"a context of {wanted:,} tokens was asked for; the model was made for "
            f"{max_position:,} and is wrong beyond.",
            hint=f"max_model_len={max_position:,}, or a rope scaling in its config.json",
        )
    if isinstance(kv_memory, int) and kv_memory > 1:
        room = kv_memory
    else:
        default = CPU_KV_FRACTION if on_cpu else 1.0
        room = int(free_bytes * (kv_memory or default))
    if room > free_bytes:
        raise Unsupported(
            f"the KV cache was given {size(room)}, but {size(free_bytes)} are free.",
            hint="ask for less kv_memory",
        )
    enough = (-(-wanted // block_size) + tables - 1) * max_num_seqs + 1
    num_blocks = min(room // kv_bytes_per_block, enough)
    fits = (num_blocks - tables) * block_size
    if fits < 1 or (max_model_len and fits < max_model_len):
        need = (-(-wanted // block_size) + tables) * kv_bytes_per_block
        raise Unsupported(
            f"a context of {wanted:,} tokens needs {size(need)} of KV cache; there is room for "
            f"{size(max(room, 0))}.",
            hint=f"max_model_len={fits:,} fits" if fits > 0 else "free some memory",
        )
    return Plan(weight_bytes, kv_bytes_per_block, num_blocks, block_size, min(wanted, fits))


@dataclass(frozen=True)
class Facts:
    """What config.json and the weights' headers say of a model; None for what they do not."""

    model_type: str
    parameters: int | None  # values stored; quantized ones are not counted
    stored_bytes: int
    stored: tuple[str, ...]  # dtypes of its tensors in the words of safetensors, most bytes first
    dtype: str | None
    quant_method: str | None
    context: int | None
    layers: int | None
    kv_values: int | None  # keys and values of one token, all layers

    def fit(self, *, free_bytes: int, on_cpu: bool, itemsize: int, block_size: int = 16) -> Plan:
        """The plan for one sequence when a plain value takes `itemsize` bytes.

        Raises Unsupported, with the bytes that are missing, when the model does not fit.
        """
        weights = self.stored_bytes if self.parameters is None else self.parameters * itemsize
        if weights > free_bytes:
            raise Unsupported(f"the weights need {size(weights)}, {size(free_bytes)} are free.")
        return make_plan(
            weight_bytes=weights,
            kv_bytes_per_block=(self.kv_values or 1) * itemsize * block_size,
            free_bytes=free_bytes - weights,
            on_cpu=on_cpu,
            kv_memory=None,
            block_size=block_size,
            max_num_seqs=1,
            max_position=self.context or 4096,
            max_model_len=None,
        )


def architecture(values: dict[str, Any]) -> str | None:
    """The architecture that a config.json's `values` name, of the text part where there are
    several, as a family of `models/` would be called; None when they name none."""
    if not isinstance(values.get("model_type"), str):
        return None
    return HFConfig(values).text("model_type")


def examine(folder: str | Path) -> Facts:
    """The facts of a model's folder; no weights are read.

    Raises NotFound, BadCheckpoint or Unsupported for a folder that is no readable model.
    """
    config = HFConfig.read(folder)
    tensors = TensorFolder(Path(folder))
    try:
        found = [tensors.find(name)[1] for name in tensors.names]
    finally:
        tensors.close()
    by_dtype: dict[str, int] = {}
    for tensor in found:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.nbytes
    method = config.quant_method
    heads, layers = config.get("num_attention_heads"), config.get("num_hidden_layers")
    values = None
    if heads and layers and (config.get("head_dim") or config.get("hidden_size")):
        head_dim = config.integer("head_dim", config.get("hidden_size", 0) // heads)
        values = 2 * layers * config.integer("num_key_value_heads", heads) * head_dim
    return Facts(
        model_type=config.text("model_type"),
        parameters=None if method else sum(prod(tensor.shape) for tensor in found),
        stored_bytes=sum(by_dtype.values()),
        stored=tuple(sorted(by_dtype, key=lambda dtype: -by_dtype[dtype])),
        dtype=config.dtype,
        quant_method=method,
        context=config.get("max_position_embeddings"),
        layers=layers,
        kv_values=values,
    )
