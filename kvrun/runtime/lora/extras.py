"""What an adapter has beyond A and B: checked against a model, and laid out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvrun.errors import BadCheckpoint, KvrunError, Unsupported
from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.lora.sites import Layout, Place, Sites, cut
from kvrun.runtime.lora.tensors import Parts

# Parts of a module (see tensors.py) that need more than products with A and B.
KINDS = ("weight", "magnitude", "bias", "shift", "tokens", "gain")


def check(sites: Sites, place: Place, module: str, parts: Parts, path: Path) -> None:
    """Raises BadCheckpoint for parts of another model's shapes, Unsupported for what a product of
    this role does not take."""
    shard, role = sites.shard(place), sites.roles[place[0]]
    if len({"weight", "A", "tokens"}.intersection(parts)) > 1:
        raise BadCheckpoint(f"the adapter in {path} both changes and replaces {module}.")
    for kind, stored in parts.items():
        wanted = _shape(shard, role, kind, parts)
        if wanted is None:
            raise Unsupported(
                f"the adapter in {path} changes {module}, which cannot be served.",
                cause=f"it has {NAMES[kind]}, which {ROLES[role]} does not take",
            )
        if stored.shape != wanted:
            raise _mismatch(path, module, shard, role, parts)


NAMES = {
    "A": "an A", "B": "a B", "base": "a copy of the base", "tokens": "rows of its own",
    "weight": "a matrix in the place of the base's (modules_to_save)",
    "magnitude": "magnitudes (DoRA)", "bias": "a bias", "shift": "a bias of B (lora_bias)",
    "gain": "a weight that is a vector",
}  # fmt: skip
ROLES = {
    "linear": "a product", "head": "the head", "embedding": "an embedding",
    "by head": "a product that is multiplied head by head",
    "norm": "a norm", "gain": "a norm without bias",
}  # fmt: skip
_REFUSED = {
    "by head": {"weight", "bias", "tokens", "gain"},
    "embedding": {"bias", "shift", "gain"},
    "linear": {"tokens", "gain"},
    "head": {"tokens", "gain"},
    "norm": {"A", "B", "weight", "magnitude", "shift", "tokens", "base"},
    "gain": {"A", "B", "weight", "magnitude", "shift", "tokens", "base", "bias"},
}


def _shape(shard: Shard, role: str, kind: str, parts: Parts) -> tuple[int, ...] | None:
    """What a part must be like in the file; None if it may not be there."""
    if kind in _REFUSED[role]:
        return None
    out, inner = shard.out_features, shard.in_features
    if kind in ("weight", "base"):
        turned = role == "embedding" or shard.transposed
        return (inner, out) if turned else (out, inner)
    if kind in ("A", "B"):
        rank = parts["A"].shape[0] if "A" in parts else 0
        return (rank, inner) if kind == "A" else (out, rank)
    return (parts[kind].shape[0], out) if kind == "tokens" else (out,)


def _mismatch(path: Path, module: str, shard: Shard, role: str, parts: Parts) -> KvrunError:
    kinds = [kind for kind in ("A", "B", *KINDS, "base") if kind in parts]
    wanted = {kind: list(_shape(shard, role, kind, parts) or ()) for kind in kinds}
    found = {kind: list(parts[kind].shape) for kind in kinds}
    if role != "linear":
        vocabulary = shard.in_features if role == "embedding" else shard.out_features
        whole = [parts[kind].shape[0] for kind in ("weight", "base") if kind in parts]
        if whole and whole[0] != vocabulary:
            return Unsupported(
                f"the adapter in {path} was made for a vocabulary of {whole[0]}, the model has "
                f"{vocabulary}.",
                cause=f"{module} has another size; requests of one batch share their vocabulary",
                hint="fuse it into the model that it was made for",
            )
    said = " and ".join(f"{kind} is {shape}" for kind, shape in found.items())
    expected = " and ".join(str(shape) for shape in wanted.values())
    return BadCheckpoint(
        f"the adapter in {path} was made for another model.",
        cause=f"{module}: {said}; expected {expected}",
    )


def ids_of(config: Mapping[str, Any], module: str, count: int, path: Path) -> tuple[int, ...]:
    """Which tokens the rows of an embedding are for: one list, or one for each module by the end of
    its name. Raises BadCheckpoint where these are not as many different ids."""
    said = config.get("trainable_token_indices")
    if isinstance(said, dict):
        said = next((ids for name, ids in said.items() if f".{module}".endswith(f".{name}")), None)
    ids = said if isinstance(said, list) else []
    if len(set(map(str, ids))) != count or not all(type(i) is int and i >= 0 for i in ids):
        raise BadCheckpoint(
            f"the adapter in {path} contradicts itself.",
            cause=f"{module} has {count} rows, trainable_token_indices = {str(said)[:60]}",
        )
    return tuple(ids)


def check_ids(sites: Sites, place: Place, ids: tuple[int, ...], path: Path) -> None:
    vocabulary = sites.shard(place).in_features
    if max(ids) >= vocabulary:
        raise Unsupported(
            f"the adapter in {path} has a row for token {max(ids)}, the model has {vocabulary} "
            "tokens.",
            cause="requests of one batch share their vocabulary",
        )


def as_kept(sites: Sites, place: Place, stored: torch.Tensor) -> torch.Tensor:
    """A replaced matrix as this rank multiplies it."""
    shard = sites.shard(place)
    if sites.roles[place[0]] == "embedding":
        return stored
    whole = stored.t() if shard.transposed else stored
    return cut(cut(whole, 0, shard.rows), 1, shard.cols)


def fill(
    sites: Sites,
    layout: Layout,
    flat: torch.Tensor,
    place: Place,
    vectors: Mapping[str, torch.Tensor],
) -> None:
    """Put one place's vectors, as they are stored, into an adapter's stretch. What is not there
    stays neutral: `flat` is zero."""
    site, part = place
    extra, rows = layout.extras[site], sites.shard(place).rows
    mine = slice(sum(sites.outs[site][:part]), sum(sites.outs[site][: part + 1]))
    for kind in ("magnitude", "gain"):
        if kind in vectors and extra.factor is not None:
            factor = sites.vector(flat, extra.factor, site)
            factor[mine] = cut(vectors[kind], 0, rows).float()
    shift = sites.vector(flat, extra.shift, site)[mine]
    for kind in ("bias", "shift"):
        if kind in vectors:
            shift += cut(vectors[kind], 0, rows).float()
