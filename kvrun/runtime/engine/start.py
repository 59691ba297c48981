"""EngineConfig -> Engine: device and dtype, weights, plan, cache, backend, graphs."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import psutil
import torch

from kvrun.errors import Unsupported
from kvrun.folder import load, names
from kvrun.runtime import attention, models
from kvrun.runtime.attention import AttentionSpec, Backend
from kvrun.runtime.attention._compiled import missing
from kvrun.runtime.cache.blocks import BlockPool
from kvrun.runtime.cache.prefix import PrefixCache
from kvrun.runtime.cache.sources import SourceCache
from kvrun.runtime.cache.states import StateCache, bytes_per_sequence
from kvrun.runtime.cache.tensors import KVCache, bytes_per_block
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine, Limits
from kvrun.runtime.engine.features import Features
from kvrun.runtime.engine.graphs import cuda_capture
from kvrun.runtime.engine.profile import memory_of_a_step
from kvrun.runtime.engine.request import Ready
from kvrun.runtime.engine.runner import ModelRunner
from kvrun.runtime.engine.scheduler import Scheduler
from kvrun.runtime.engine.sizes import TURNS, sized
from kvrun.runtime.engine.slots import Slots
from kvrun.runtime.engine.threads import Threads
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.layers.cross import CrossDecoder
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.lora.bank import LoraBank
from kvrun.runtime.lora.sites import Sites
from kvrun.runtime.plan import Plan, make_plan, size
from kvrun.runtime.sampling.sampler import Sampler
from kvrun.runtime.text import Text

# Backends that `attention="auto"` tries, best first; before them FlashInfer, where it is compiled.
AUTO = ("triton", "sdpa")
FLASHINFER = "flashinfer"
# Backends that read everything on the device, so that their steps can be captured.
CAPTURED = ("triton", FLASHINFER)
# Memory for adapters unless a configuration says how much: of what is free beside the weights, and
# no more than that; and of the host's, where adapters of a GPU wait for their turn.
LORA_FRACTION, LORA_BYTES, LORA_HOST_FRACTION = 0.06, 4 << 30, 0.5
# When a configuration does not say for how long a context the model was made.
UNSAID_CONTEXT = 4096


def start(config: EngineConfig) -> Engine:
    """Load a model and make it ready. Raises KvrunError: what is wrong, and what to do."""
    begun = time.perf_counter()
    device = choose_device(config.device)
    config = sized(config, device)
    folder = Path(config.model)
    with ThreadPoolExecutor(1) as pool:
        # A large tokenizer takes as long to read as some weights do.
        text = pool.submit(Text.open, folder)
        model, dtype = _load(config, folder, device)
        eos_ids = opened.eos_token_ids if (opened := text.result()) else ()
    kept = torch.float8_e4m3fn if config.kv_dtype == "fp8" else dtype
    why_not = _without_flashinfer(config.attention, model.specs, dtype, kept, device)
    wanted = FLASHINFER if config.attention == "auto" and why_not is None else config.attention
    name, backend_class = choose_backend(wanted, model.specs, device)
    bank = _bank(config, model, dtype, device)
    features = Features.of(model, dtype, _free_bytes(device))
    backend, plan = _cache(config, model, backend_class, dtype, device, bank, features)
    runner = _runner(config, model, backend, plan, eos_ids, dtype, device, bank, features)
    note = _note(folder, device)
    capturable = model.start_id is None and not note and name in CAPTURED
    captured = capturable and config.cuda_graphs and device.type == "cuda"
    if captured:
        runner.capture(plan.max_num_seqs, dtype, cuda_capture(device))
    ready = Ready(
        plan=plan.line() + _uncaptured(config, model, device, captured),
        max_model_len=plan.max_model_len,
        vocab_size=model.vocab_size,
        kv_tokens=plan.kv_tokens,
        max_num_seqs=plan.max_num_seqs,
        block_size=plan.block_size,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        attention=name,
        attention_note=f"not by {FLASHINFER}: {why_not}" if why_not and name != "sdpa" else "",
        load_seconds=time.perf_counter() - begun,
        note=note,
    )
    return Engine(
        _scheduler(config, model, plan, captured, eos_ids, bank),
        runner,
        Limits(
            model.vocab_size,
            plan.max_model_len,
            model.vision.places if model.vision else None,
            model.start_id,
        ),
        ready=ready,
        seed=config.seed,
        run_ahead=cast(int, config.run_ahead),
        bank=bank,
    )


def _scheduler(
    config: EngineConfig, model: Decoder, plan: Plan, captured: bool,
    eos_ids: tuple[int, ...], bank: LoraBank | None,
) -> Scheduler:  # fmt: skip
    blocks = BlockPool(plan.num_blocks)
    shares = config.prefix_caching and model.start_id is None and not model.states
    crossing = isinstance(model, CrossDecoder)
    return Scheduler(
        blocks,
        PrefixCache(blocks, plan.block_size) if shares else None,
        block_size=plan.block_size,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=cast(int, config.max_num_batched_tokens),
        # A turn that fails behind another one could not go back to the state before both.
        turns=TURNS if captured and not model.states else 1,
        shares=not model.states,
        eos_ids=frozenset(eos_ids),
        bank=bank,
        sources=SourceCache(blocks, shared=config.prefix_caching) if crossing else None,
    )


def _bank(
    config: EngineConfig, model: Decoder, dtype: torch.dtype, device: torch.device
) -> LoraBank:
    """Room for adapters, and those that the configuration names."""
    asked, free = config.lora_memory, _free_bytes(device)
    if isinstance(asked, int) and asked > 1:
        room = asked
    elif asked is not None:
        room = int(free * asked)
    else:
        room = min(int(free * LORA_FRACTION), LORA_BYTES)
    if room > free:
        raise Unsupported(
            f"adapters were given {size(room)}, but {size(free)} are free.",
            hint="ask for less lora_memory",
        )
    host_room = int(psutil.virtual_memory().available * LORA_HOST_FRACTION)
    sites = Sites(model.products)
    bank = LoraBank(sites, device=device, dtype=dtype, room=room, host_room=host_room)
    for name, path in config.adapters.items():
        bank.register(name, path)
    return bank


def _cache(
    config: EngineConfig,
    model: Decoder,
    backend: type[Backend],
    dtype: torch.dtype,
    device: torch.device,
    bank: LoraBank,
    features: Features | None,
) -> tuple[Backend, Plan]:
    """The attention backend with a cache as large as the plan allows."""
    size = cast(int, config.block_size)
    kept = torch.float8_e4m3fn if config.kv_dtype == "fp8" else dtype
    reserve = 0
    if device.type == "cuda":
        trial = backend(KVCache(model.specs, 2, size, kept, device), dtype)
        tokens = cast(int, config.max_num_batched_tokens)
        reserve = memory_of_a_step(model, trial, tokens, cast(int, config.max_num_seqs), device)
    if device.type == "cpu":
        reserve = bank.resident.arena.nbytes  # promised, but not taken from the system yet
    reserve += features.limit if features else 0
    blocks, states = (
        bytes_per_block(model.specs, size, kept),
        bytes_per_sequence(model.states, dtype),
    )
    plan = _plan(config, model, device, blocks, states, reserve)
    return backend(KVCache(model.specs, plan.num_blocks, size, kept, device), dtype), plan


def _runner(
    config: EngineConfig,
    model: Decoder,
    backend: Backend,
    plan: Plan,
    eos_ids: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    bank: LoraBank,
    features: Features | None,
) -> ModelRunner:
    parameters = model.parameter_bytes // dtype.itemsize
    return ModelRunner(
        model,
        backend,
        Sampler(model.vocab_size, device),
        # Turns beyond a sequence's end write to the padding block, which is where pages end.
        Slots(plan.max_num_seqs, -(-(plan.max_model_len + TURNS) // plan.block_size), device),
        device=device,
        block_size=plan.block_size,
        eos_ids=eos_ids,
        threads=Threads(config.threads, parameters) if device.type == "cpu" else None,
        bank=bank,
        states=StateCache(model.states, plan.max_num_seqs, dtype, device) if model.states else None,
        features=features,
    )


def _uncaptured(config: EngineConfig, model: Decoder, device: torch.device, captured: bool) -> str:
    """Why a GPU launches its steps kernel by kernel, although it was not asked to."""
    if captured or device.type != "cuda" or not config.cuda_graphs:
        return ""
    best: type[Backend] = load(attention.__name__, CAPTURED[0]).Attention
    reason = next((r for r in (best.reject(s, device) for s in model.specs) if r), None)
    reason = f"{CAPTURED[0]}: {reason}" if reason else f"attention='{config.attention}'"
    return f"; steps are not captured ({reason})"


def choose_device(wanted: str) -> torch.device:
    """The device asked for, or the best there is. Raises Unsupported for one that is not there."""
    available = torch.cuda.is_available()
    if wanted == "auto":
        return torch.device("cuda" if available else "cpu")
    if wanted.startswith("cuda") and not available:
        raise Unsupported(
            f"the device '{wanted}' is not there: torch {torch.__version__} sees no CUDA device.",
            hint="device='cpu', or install a torch build with CUDA",
        )
    return torch.device(wanted)


def choose_dtype(wanted: str, stored: str | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in. "auto": as stored, where the device multiplies it natively."""
    name = wanted if wanted != "auto" else stored or "float32"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        dtype = torch.float32
    if wanted == "auto" and device.type == "cpu" and dtype is not torch.float32:
        # Where bfloat16 is not native it is slower than float32, and float16 always is.
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        dtype = torch.bfloat16 if native and dtype is torch.bfloat16 else torch.float32
    return dtype


def choose_backend(
    wanted: str, specs: list[AttentionSpec], device: torch.device
) -> tuple[str, type[Backend]]:
    """The backend asked for, or the first of AUTO that can serve every layer."""
    reasons = []
    # Without attention a backend still plans steps, on the devices that it knows.
    specs = specs or [AttentionSpec(0, 1, 1, 64, 1.0)]
    for name in AUTO if wanted == "auto" else (wanted,):
        backend: type[Backend] = load(attention.__name__, name).Attention
        reason = next((r for r in (backend.reject(s, device) for s in specs) if r), None)
        if reason is None:
            return name, backend
        reasons.append(f"{name}: {reason}")
    raise Unsupported(
        "no attention backend can serve this model.",
        cause="; ".join(reasons),
        hint=f"known backends: {', '.join(names(attention.__name__))}",
    )


def _without_flashinfer(
    wanted: str,
    specs: list[AttentionSpec],
    dtype: torch.dtype,
    kept: torch.dtype,
    device: torch.device,
) -> str | None:
    """Why "auto" does without FlashInfer; None when it is to be taken.

    Raises Unsupported where it was asked for by name and cannot be used now.
    """
    if wanted not in ("auto", FLASHINFER):
        return ""
    reason = missing(specs, dtype, kept, device)
    if wanted == FLASHINFER and reason is not None:
        raise Unsupported("attention='flashinfer' cannot be used here.", cause=reason,
                          hint="attention='auto' takes what can")  # fmt: skip
    if reason is None:
        backend = load(attention.__name__, FLASHINFER).Attention
        reason = next((r for r in (backend.reject(s, device) for s in specs) if r), None)
    return reason


def _load(config: EngineConfig, folder: Path, device: torch.device) -> tuple[Decoder, torch.dtype]:
    checkpoint = Checkpoint(
        folder,
        device=device,
        load_format=config.load_format,
        quantize=config.rounding,
        seed=config.seed,
    )
    checkpoint.config.context = config.max_model_len
    checkpoint.dtype = choose_dtype(config.dtype, checkpoint.config.dtype, device)
    free = _free_bytes(device)
    if (needed := checkpoint.needed_bytes) > free:
        checkpoint.close()
        raise Unsupported(
            f"the weights need {size(needed)}, {size(free)} are free.",
            hint="choose a smaller model, or close other programs",
        )
    if checkpoint.config.text("model_type") in names(models.__name__):
        return models.build(checkpoint), checkpoint.dtype
    _refuse_fallback(config, checkpoint)
    return load("kvrun.runtime.fallback", "load").build(checkpoint, folder), checkpoint.dtype


def _refuse_fallback(config: EngineConfig, checkpoint: Checkpoint) -> None:
    """Raise Unsupported where transformers' code may not or cannot stand in for a family."""
    kind = checkpoint.config.text("model_type")
    if config.fallback and not config.adapters:
        return
    checkpoint.close()
    if config.adapters:
        raise Unsupported(
            f"adapters need a family of kvrun, and there is none for '{kind}'.",
            hint="leave the adapters out",
        )
    raise Unsupported(
        f"the architecture '{kind}' is not supported: kvrun has no family for it, and "
        "transformers' own code is ruled out.",
        hint="leave out --no-fallback (fallback=False)",
    )


def _note(folder: Path, device: torch.device) -> str:
    """What there is to say of a model without a family here."""
    kind = HFConfig.read(folder).text("model_type")
    if kind in names(models.__name__):
        return ""
    graphs = ", without CUDA graphs" if device.type == "cuda" else ""
    return f"{kind}: no family of kvrun; transformers' own code on kvrun's paged attention{graphs}"


def _plan(
    config: EngineConfig,
    model: Decoder,
    device: torch.device,
    block_bytes: int,
    state_bytes: int,
    reserve: int,
) -> Plan:
    free = max(_free_bytes(device) - reserve, 0)
    tokens, block_size = config.kv_tokens, cast(int, config.block_size)
    # One block more: the padding.
    blocks = None if tokens is None else -(-tokens // block_size) + 1
    room = None
    if blocks is not None:
        states = min((cast(int, config.max_num_seqs) + 1) * state_bytes, free // 2)
        room = blocks * block_bytes + states
    return make_plan(
        weight_bytes=model.parameter_bytes,
        kv_bytes_per_block=block_bytes,
        state_bytes=state_bytes,
        most_blocks=blocks,
        free_bytes=free,
        on_cpu=device.type == "cpu",
        kv_memory=config.kv_memory if room is None else room,
        block_size=block_size,
        max_num_seqs=cast(int, config.max_num_seqs),
        max_position=model.max_position or config.max_model_len or UNSAID_CONTEXT,
        max_model_len=config.max_model_len,
        tables=1 if model.start_id is None else 2,
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
