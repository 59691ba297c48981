"""Plan: what a model takes of this machine's memory, how much context fits, and why."""

import sys
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
    max_num_seqs: int = 0  # how many may run at once
    state_bytes: int = 0  # what recurrent layers remember of a sequence

    @property
    def kv_tokens(self) -> int:
        return (self.num_blocks - 1) * self.block_size

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.kv_bytes_per_block

    def line(self) -> str:
        """One line for people."""
        parts = [f"weights {size(self.weight_bytes)}"]
        if self.kv_bytes or not self.state_bytes:
            parts.append(f"KV {size(self.kv_bytes)} = {self.kv_tokens:,} tokens")
        if self.state_bytes:
            each, all_of_them = size(self.state_bytes), size(self.state_bytes * self.max_num_seqs)
            many = "sequences" if self.max_num_seqs > 1 else "sequence"
            parts.append(f"states {all_of_them} = {self.max_num_seqs:,} {many} of {each}")
        parts.append(f"context {self.max_model_len:,}")
        if self.state_bytes:
            parts.append("prefixes are not reused: states cannot be")
        return ", ".join(parts)


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
    state_bytes: int = 0,
    most_blocks: int | None = None,
) -> Plan:
    """Size the KV cache and the context from what is free once the weights are in memory.

    Where a sequence has a state of `state_bytes`, states come first, for as many sequences as half
    of the room has place for, or more if keys and values need less; they get `most_blocks` at most.

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
    room = _room(kv_memory, free_bytes, on_cpu)
    most = most_blocks or sys.maxsize
    each = -(-wanted // block_size) + tables - 1
    enough = min(each * max_num_seqs + 1, most)
    if state_bytes:
        share = room - min(room // 2, enough * kv_bytes_per_block)
        max_num_seqs = _with_states(share, state_bytes, max_num_seqs, kv_memory)
        room -= (max_num_seqs + 1) * state_bytes
        enough = min(each * max_num_seqs + 1, most)
    num_blocks = min(room // kv_bytes_per_block, enough) if kv_bytes_per_block else enough
    fits = (num_blocks - tables) * block_size
    if fits < 1 or (max_model_len and fits < max_model_len):
        need = (-(-wanted // block_size) + tables) * kv_bytes_per_block
        raise Unsupported(
            f"a context of {wanted:,} tokens needs {size(need)} of KV cache; there is room for "
            f"{size(max(room, 0))}.",
            hint=f"max_model_len={fits:,} fits" if fits > 0 else _more_room(kv_memory),
        )
    context = min(wanted, fits)
    return Plan(
        weight_bytes, kv_bytes_per_block, num_blocks, block_size, context, max_num_seqs, state_bytes
    )


def _more_room(kv_memory: int | float | None) -> str:
    """What to do when there is no room at all: less was asked for than is needed, or is free."""
    return "free some memory" if kv_memory is None else "ask for more kv_memory"


def _with_states(room: int, state_bytes: int, most: int, kv_memory: int | float | None) -> int:
    """For how many sequences there is room, and a row more for padding."""
    count = min(most, room // state_bytes - 1)
    if count < 1:
        raise Unsupported(
            f"the state of a sequence needs {size(2 * state_bytes)}; there is room for "
            f"{size(max(room, 0))}.",
            hint=_more_room(kv_memory),
        )
    return count


def _room(kv_memory: int | float | None, free_bytes: int, on_cpu: bool) -> int:
    """Bytes for keys, values and states."""
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
    return room


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
    kv_values: int | None  # what the cache keeps of one token, all layers
    window_values: int = 0  # of a sequence in recurrent layers: last inputs, as plain values,
    state_values: int = 0  # and states, in fp32

    def state_bytes(self, itemsize: int) -> int:
        """Of a running sequence: twice, because a step reads one state and writes another."""
        return 2 * (self.window_values * itemsize + 4 * self.state_values)

    def fit(self, *, free_bytes: int, on_cpu: bool, itemsize: int, block_size: int = 16) -> Plan:
        """The plan for one sequence when a plain value takes `itemsize` bytes.

        Raises Unsupported, with the bytes that are missing, when the model does not fit.
        """
        weights = self.stored_bytes if self.parameters is None else self.parameters * itemsize
        if weights > free_bytes:
            raise Unsupported(f"the weights need {size(weights)}, {size(free_bytes)} are free.")
        return make_plan(
            weight_bytes=weights,
            kv_bytes_per_block=(self.kv_values or (not self.state_values)) * itemsize * block_size,
            state_bytes=self.state_bytes(itemsize),
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
    named = isinstance(values.get("model_type"), str)
    if not named and ("model_type" in values or not isinstance(values.get("ssm_cfg"), dict)):
        return None
    return HFConfig(values).text("model_type")


def examine(folder: str | Path) -> Facts:
    """The facts of a model's folder; no weights are read.

    Raises NotFound, BadCheckpoint or Unsupported for a folder that is no readable model.
    """
    config = HFConfig.read(folder)
    tensors = TensorFolder(Path(folder))
    try:
        shapes = {name: tensors.find(name)[1].shape for name in tensors.names}
        found = [tensors.find(name)[1] for name in tensors.names]
    finally:
        tensors.close()
    by_dtype: dict[str, int] = {}
    for tensor in found:
        by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + tensor.nbytes
    method = config.quant_method
    heads, layers = config.get("num_attention_heads"), config.get("num_hidden_layers")
    recurrent = sum(name.endswith(".A_log") for name in shapes)
    window, state = _recurrent(config, shapes)
    values = 0 if recurrent and recurrent == layers else None
    if (
        values is None
        and heads
        and layers
        and (config.get("head_dim") or config.get("hidden_size"))
    ):
        head_dim = config.integer("head_dim", config.get("hidden_size", 0) // heads)
        values = 2 * (layers - recurrent) * config.integer("num_key_value_heads", heads) * head_dim
    if layers and (rank := config.get("kv_lora_rank")):
        values = layers * (rank + config.integer("qk_rope_head_dim"))
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
        window_values=window,
        state_values=state,
    )


def _recurrent(config: HFConfig, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """What recurrent layers remember of a sequence, by the shapes of their tensors: values of last
    inputs, and of states."""
    window = state = 0
    size = config.get("mamba_d_state", config.get("state_size", 128))
    groups = config.get("mamba_n_groups", config.get("n_groups", 1))
    for name, shape in shapes.items():
        filters = shapes.get(name.removesuffix("A_log") + "conv1d.weight")
        if name.endswith(".A_log") and filters is not None:
            channels, _, taps = filters
            window += channels * (taps - 1)
            # Mamba's decays are one for each value; Mamba-2 filters what goes in and out as well.
            state += prod(shape) if len(shape) == 2 else (channels - 2 * groups * size) * size
    return window, state
