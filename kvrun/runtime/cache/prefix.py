"""PrefixCache: a full block and all before it -> the block that holds its keys and values."""

import os
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from kvrun.runtime.cache.blocks import BlockPool


class _Entry(NamedTuple):
    block: int
    parent: bytes
    tokens: tuple[int, ...]


class PrefixCache:
    """Chained hashes of full blocks.

    Keys start from a random secret of this process and the adapter's identity, so that they can be
    neither predicted nor shared between adapters; on a hit the tokens themselves are compared.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._size = block_size
        self._secret = os.urandom(16)
        self._entries: dict[bytes, _Entry] = {}
        self._keys: dict[int, bytes] = {}

    def root(self, identity: str | None) -> bytes:
        """Where the chain of an adapter (None: the base model) starts."""
        return blake2b(repr(identity).encode(), key=self._secret, digest_size=16).digest()

    def lookup(self, root: bytes, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """The longest chain of cached blocks that starts `tokens`, and their keys.

        At least the last token stays out, because its logits have to be computed. The blocks are
        not yet owned by the caller: `BlockPool.share` them before anything else is taken.
        """
        blocks: list[int] = []
        keys: list[bytes] = []
        parent = root
        for start in range(0, len(tokens) - self._size, self._size):
            chunk = tuple(tokens[start : start + self._size])
            key = self._key(parent, chunk)
            entry = self._entries.get(key)
            if entry is None or entry.tokens != chunk or entry.parent != parent:
                break
            blocks.append(entry.block)
            keys.append(key)
            parent = key
        return blocks, keys

    def register(self, parent: bytes, tokens: Sequence[int], block: int) -> bytes:
        """`block` now holds `tokens` (block_size of them) behind `parent`; returns its key.

        When the same content is cached already, the older block stays the one that is hit.
        """
        chunk = tuple(tokens)
        key = self._key(parent, chunk)
        if key not in self._entries:
            self._entries[key] = _Entry(block, parent, chunk)
            self._keys[block] = key
            self._pool.keep(block, self._forget_key)
        return key

    def forget(self, blocks: Sequence[int]) -> None:
        """The content of these blocks must not be hit any more."""
        for block in blocks:
            if block in self._keys:
                self._forget_key(block)
                self._pool.keep(block, None)

    def _forget_key(self, block: int) -> None:
        del self._entries[self._keys.pop(block)]

    def _key(self, parent: bytes, chunk: tuple[int, ...]) -> bytes:
        return blake2b(
            parent + array("q", chunk).tobytes(), key=self._secret, digest_size=16
        ).digest()
