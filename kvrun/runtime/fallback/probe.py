"""A class is believed once two sequences, packed and in chunks, give what each gives alone."""

import inspect
from typing import Any

import torch

from kvrun.errors import KvrunError, Unsupported
from kvrun.runtime.attention.sdpa import Attention
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.tensors import KVCache
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.fallback.foreign import Foreign
from kvrun.runtime.fallback.interface import NAME, SURVEY, Call, Survey, running

# A mask is looked at from so far, where a configuration does not say how far a model sees.
_FAR, _FARTHEST = 1 << 16, 1 << 20
_LENGTHS = (13, 9)  # tokens of the two sequences of a probe
_BLOCK = 4
# Of a row's logits, how far what is packed may be from what is alone: fp32, and smaller types.
_EXACT, _ROUNDED = 1e-3, 0.06


@torch.inference_mode()
def probed(w: Checkpoint, model: Any, limit: int | None) -> Foreign:
    """The model, once two sequences packed and in chunks have given what each gives alone.

    Raises Unsupported with the reason why it is not right here.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise Unsupported("its class takes no positions")
    generator = torch.Generator().manual_seed(1)
    count = model.get_input_embeddings().weight.shape[0]
    prompts = [torch.randint(count, (n,), generator=generator).to(w.device) for n in _LENGTHS]
    try:
        alone = [
            model(input_ids=ids[None], position_ids=_upto(ids)[None]).logits[0] for ids in prompts
        ]
        calls = _survey(w, model, prompts[0])
        model.set_attn_implementation(NAME)
        foreign = Foreign(w, model, calls, alone[0].shape[-1], limit)
        packed = _in_chunks(w, foreign, prompts)
    except KvrunError:
        raise
    except Exception as error:  # whatever a class says that expects to be called otherwise
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise Unsupported(f"probing it failed: {said}") from error
    wanted = torch.cat(alone).float()
    off = (packed.float() - wanted).norm(dim=-1)
    off = off / (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-12)
    exact = w.dtype is torch.float32
    # A router that turns at a near tie moves one token far where values are rounded.
    worst = float(off.max() if exact else off.median())
    if not worst <= (_EXACT if exact else _ROUNDED):
        raise Unsupported(f"sequences that are packed differ from each alone (by {worst:.2g})")
    return foreign


def _survey(w: Checkpoint, model: Any, ids: torch.Tensor) -> list[Call]:
    farthest = min(w.config.get("max_position_embeddings") or _FAR, _FARTHEST)
    survey = Survey(max(farthest, _FAR))
    model.set_attn_implementation(SURVEY)
    before = running.set(survey)
    try:
        model(input_ids=ids[None], position_ids=_upto(ids)[None], use_cache=False)
    finally:
        running.reset(before)
    layers, calls = w.config.integer("num_hidden_layers"), len(survey.calls)
    if calls < layers or calls % layers:
        raise Unsupported(f"{calls} of {layers} layers call the attention function")
    return survey.calls


def _upto(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(ids), device=ids.device)


def _in_chunks(w: Checkpoint, model: Foreign, prompts: list[torch.Tensor]) -> torch.Tensor:
    """The logits of two prompts, one below the other, computed together in uneven steps."""
    pages = -(-max(_LENGTHS) // _BLOCK)
    cache = KVCache(model.specs, 2 * pages + 1, _BLOCK, w.dtype, w.device)
    backend = Attention(cache, w.dtype)
    # Neighbours' blocks alternate, so that no sequence lies in one stretch.
    tables = torch.arange(1, 2 * pages + 1).view(pages, 2).t()
    rows: list[list[torch.Tensor]] = [[], []]
    for spans in (((0, 5), (0, 3)), ((5, 12), (3, 4)), ((12, 13), (4, 9))):
        batch = _batch(prompts, spans, tables, backend, w.device)
        counts = batch.query_lens_host
        backend.plan(batch)
        for row, part in zip(rows, torch.split_with_sizes(model(batch), counts), strict=True):
            row.append(part)
    return torch.cat([part for row in rows for part in row])


def _batch(
    prompts: list[torch.Tensor],
    spans: tuple[tuple[int, int], ...],
    tables: torch.Tensor,
    backend: Attention,
    device: torch.device,
) -> Batch:
    counts = [b - a for a, b in spans]
    places = [torch.arange(a, b) for a, b in spans]
    slots = [t[p // _BLOCK] * _BLOCK + p % _BLOCK for t, p in zip(tables, places, strict=True)]
    ends = torch.tensor([0, counts[0], sum(counts)])
    return Batch(
        ids=torch.cat([ids[a:b] for ids, (a, b) in zip(prompts, spans, strict=True)]),
        positions=torch.cat(places).to(device),
        slot_mapping=torch.cat(slots).to(device),
        block_tables=tables.to(device),
        cu_seqlens=ends.to(device),
        context_lens=torch.tensor([b for _, b in spans], device=device),
        last_rows=torch.arange(sum(counts), device=device),
        query_lens_host=counts,
        context_lens_host=[b for _, b in spans],
        block_size=_BLOCK,
        backend=backend,
    )
