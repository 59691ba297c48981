"""How much memory a step takes beside weights and cache: the largest one is run once."""

import torch

from kvrun.runtime.attention import Backend
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.states import StateCache
from kvrun.runtime.engine.reader import AT_ONCE
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.encoder import EncoderDecoder

# Of the device's memory, for what its allocator cannot give back in one piece.
_MARGIN = 0.015
# Captured graphs, their workspaces and code.
_GRAPHS = 768 << 20


@torch.inference_mode()
def memory_of_a_step(
    model: Decoder, backend: Backend, tokens: int, sequences: int, device: torch.device
) -> int:
    """Bytes that a CUDA device must keep free of weights and cache.

    Measured on prompts of `tokens` tokens together; the logits of `sequences` rows, in fp32 and
    changed by options, and a margin are added to it.
    """
    batch = _prompts(tokens, model.max_position or tokens, backend, device)
    if model.states:
        slots = torch.arange(len(batch.query_lens_host), device=device)
        states = StateCache(model.states, len(slots), torch.float32, device)
        batch.recurrent = states.rows(slots, batch.cu_seqlens, batch.context_lens)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    if isinstance(model, EncoderDecoder):
        _read(model, sequences, backend, device)
    else:
        if model.vision is not None:
            model.vision(model.vision.largest())
        backend.plan(batch)
        model(batch)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    logits = 4 * 4 * sequences * model.vocab_size
    total = torch.cuda.get_device_properties(device).total_memory
    return int(peak + logits + _GRAPHS + _MARGIN * total)


def _read(model: EncoderDecoder, sequences: int, backend: Backend, device: torch.device) -> None:
    """A long prompt, and first tokens of answers to short ones."""
    model.encode(_prompts(AT_ONCE, AT_ONCE, backend, device))
    batch = _prompts(sequences, 1, backend, device)
    batch.source = _prompts(sequences, 1, backend, device)
    backend.plan(batch)
    backend.plan(batch.source)
    model(batch)


def _prompts(tokens: int, longest: int, backend: Backend, device: torch.device) -> Batch:
    """Prompts that start together, all of whose keys and values go to the padding block."""
    lengths = [min(longest, tokens - first) for first in range(0, tokens, longest)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    count = len(lengths)
    return Batch(
        ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=torch.cat([torch.arange(n) for n in lengths]).to(device),
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
        block_tables=torch.zeros((count, 1), dtype=torch.int32, device=device),
        cu_seqlens=ends.to(device),
        context_lens=torch.tensor(lengths, device=device),
        last_rows=(ends[1:] - 1).to(device),
        query_lens_host=lengths,
        context_lens_host=lengths,
        block_size=backend.cache.block_size,
        backend=backend,
    )
