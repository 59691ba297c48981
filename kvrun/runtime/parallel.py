"""Group: this rank among its peers, and the part of a tensor's dimension that it keeps."""

from dataclasses import dataclass

import torch

from kvrun.errors import Unsupported


@dataclass(frozen=True)
class Group:
    """Rank `rank` of `size` ranks that share one model."""

    rank: int = 0
    size: int = 1

    def cut(self, total: int, what: str = "dimension") -> tuple[int, int]:
        """The range [start, stop) of `total` equal units that this rank keeps.

        Raises Unsupported when the units cannot be shared evenly.
        """
        if total % self.size:
            raise Unsupported(
                f"{what} of {total} cannot be cut for {self.size} ranks.",
                hint="use a number of devices that divides it",
            )
        share = total // self.size
        return self.rank * share, (self.rank + 1) * share

    def cut_kv(self, heads: int, kv_heads: int) -> tuple[int, int]:
        """The key/value heads that serve this rank's query heads.

        With fewer key/value heads than ranks a head is replicated on the ranks that use it.
        """
        if kv_heads % self.size == 0:
            return self.cut(kv_heads, "key/value heads")
        if self.size % kv_heads:
            raise Unsupported(
                f"{kv_heads} key/value heads cannot be cut for {self.size} ranks.",
                hint="use a number of devices that divides them, or is a multiple of them",
            )
        first, _ = self.cut(heads, "attention heads")
        head = first // (heads // kv_heads)
        return head, head + 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all ranks, on every rank."""
        if self.size == 1:
            return x
        raise Unsupported("this build runs a model on one device only.", hint="use one rank")
