"""SourceCache: a prompt that an encoder has read, or an image that eyes have seen -> the blocks
with its cross keys and values."""

from collections.abc import Hashable, Sequence

from kvrun.runtime.cache.blocks import BlockPool


class SourceCache:
    """Whole prompts and images only: they are seen in both directions, so that no part of one is
    like the same part of another. What nobody owns any more can be hit until it is evicted.
    Unless `shared`, only by the request that it was read for.
    """

    def __init__(self, pool: BlockPool, *, shared: bool = True) -> None:
        self._pool = pool
        self._shared = shared
        self._entries: dict[Hashable, list[int]] = {}
        self._keys: dict[int, Hashable] = {}

    def lookup(self, request_id: str, source: Hashable) -> list[int]:
        """The blocks of a source; none if it is not there. `BlockPool.share` them at once."""
        return list(self._entries.get(self._key(request_id, source), ()))

    def register(self, request_id: str, source: Hashable, blocks: Sequence[int]) -> None:
        """`blocks` hold this source; where others do already, those stay the ones that are hit."""
        key = self._key(request_id, source)
        if key not in self._entries:
            self._entries[key] = list(blocks)
            for block in blocks:
                self._keys[block] = key
                self._pool.keep(block, self._forget)

    def forget(self, blocks: Sequence[int]) -> None:
        """The content of these blocks must not be hit any more."""
        for block in blocks:
            if block in self._keys:
                self._pool.keep(block, None)
                self._forget(block)

    def _key(self, request_id: str, source: Hashable) -> Hashable:
        return None if self._shared else request_id, source

    def _forget(self, gone: int) -> None:
        """A source is of no use without one of its blocks."""
        for block in self._entries.pop(self._keys[gone]):
            del self._keys[block]
            if block != gone:
                self._pool.keep(block, None)
