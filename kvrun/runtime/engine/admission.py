"""Which waiting sequence is the next to start, and what it can share with others."""

from collections.abc import Iterable

from kvrun.errors import KvrunError
from kvrun.runtime.cache.prefix import PrefixCache
from kvrun.runtime.cache.sources import SourceCache
from kvrun.runtime.engine.sequence import Sequence, State
from kvrun.runtime.lora.bank import LoraBank, Place


def first_ready(
    waiting: Iterable[Sequence], bank: LoraBank | None, prefix: PrefixCache | None
) -> tuple[Sequence | None, list[tuple[Sequence, str]]]:
    """The first sequence that lacks nothing but blocks; and those whose adapter cannot be read,
    with the reason.

    One whose adapter is being loaded holds nobody up. One that finds all room for adapters in use
    does hold up those with adapters behind it, or its turn might never come.
    """
    broken: list[tuple[Sequence, str]] = []
    full = False
    for sequence in waiting:
        if _waits_for_sibling(sequence):
            continue
        if sequence.adapter is None or bank is None:
            return sequence, broken
        if full and not sequence.pinned:
            continue
        try:
            place = bank.place(sequence.adapter, sequence.pinned)
        except KvrunError as error:
            broken.append((sequence, error.in_one_line))
            continue
        sequence.pinned |= sequence.adapter.slot > 0
        full |= place is Place.FULL
        if place is Place.READY:
            if prefix:
                # Keys and values depend on the adapter: its content is where their chain starts.
                sequence.keys[0] = prefix.root(sequence.adapter.identity)
            return sequence, broken
    return None, broken


def known_prefix(
    sequence: Sequence, prefix: PrefixCache | None, block_size: int
) -> tuple[list[int], list[bytes]]:
    """Blocks that hold the first tokens of a sequence, and their keys where these are cached."""
    if sequence.unscored:
        return [], []  # only computing a token tells what the next one's chances were
    if prefix:
        return prefix.lookup(sequence.keys[0], sequence.named(0, len(sequence.tokens)))
    leader = sequence.leader
    if leader is not sequence and leader.state is State.RUNNING and not leader.draining:
        shared = min(sequence.prompt_len - 1, leader.scheduled) // block_size
        return leader.blocks[:shared], []
    return [], []


def known_sources(
    sequence: Sequence, cache: SourceCache | None, block_size: int
) -> tuple[list[list[int]], list[int]]:
    """Of each source of a sequence: the blocks that hold it; how many it needs where none do."""
    known = [
        cache.lookup(*sequence.source_key(source)) if cache else [] for source in sequence.sources
    ]
    pairs = zip(sequence.sources, known, strict=True)
    return known, [0 if hit else -(-source.rows // block_size) for source, hit in pairs]


def _waits_for_sibling(sequence: Sequence) -> bool:
    """n > 1: the first choice computes the prompt, the others then share its blocks."""
    return sequence.leader is not sequence and not sequence.leader.generated
