"""BlockPool: which block of the KV cache belongs to whom, by reference counts."""

from collections import OrderedDict
from collections.abc import Callable, Sequence


class BlockPool:
    """Ids of cache blocks. Block 0 is nobody's: padding reads and writes it.

    A block with no owner is free. A free block may still hold a prefix that can be hit (`keep`):
    such blocks are taken last, the least recently released first, and whoever keeps one is told.
    """

    def __init__(self, num_blocks: int) -> None:
        self.total = num_blocks - 1
        self._owners = [0] * num_blocks
        self._kept: list[Callable[[int], None] | None] = [None] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def free(self) -> int:
        """How many blocks can be taken now, kept ones included."""
        return len(self._free)

    @property
    def kept(self) -> int:
        """How many free blocks still hold a prefix."""
        return len(self.kept_blocks())

    def kept_blocks(self) -> list[int]:
        """The free blocks that still hold a prefix, those that are taken first in front."""
        return [block for block in self._free if self._kept[block]]

    def owners(self, block: int) -> int:
        return self._owners[block]

    def take(self, count: int) -> list[int]:
        """`count` free blocks, now with one owner each. The caller has looked at `free`."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks wanted, {len(self._free)} free")
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            if evicted := self._kept[block]:
                self._kept[block] = None
                evicted(block)
            self._owners[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more owner for each block; a kept free block comes back into use."""
        for block in blocks:
            if self._owners[block] == 0:
                del self._free[block]
            self._owners[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One owner fewer for each block.

        The last blocks are released first, so that the head of a prefix, which more requests can
        hit, is evicted after its tail.
        """
        for block in reversed(blocks):
            if self._owners[block] < 1:
                raise RuntimeError(f"block {block} is released more often than taken")
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free[block] = None
                if not self._kept[block]:
                    self._free.move_to_end(block, last=False)

    def keep(self, block: int, evicted: Callable[[int], None] | None) -> None:
        """Say that the content of `block` is worth keeping once it has no owner, and whom to tell
        when it goes; None: it is not."""
        self._kept[block] = evicted
        if block in self._free:
            self._free.move_to_end(block, last=evicted is not None)
