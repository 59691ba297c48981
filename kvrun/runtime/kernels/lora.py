"""Low-rank changes of many adapters to one product: the twin of `triton/lora.py`, in plain torch.

y[t] += B · A · x[t], with the A and B of the adapter of row t. Rows with an adapter are listed by
adapter and cut into tiles, so that each tile reads the matrices of its adapter once; rows without
one are not listed and cost nothing. All adapters lie in one tensor, `arena`, and `table` says where
(one row for each adapter, `slot`): the start of A [rank of all parts, in], that rank; then for each
part of the product's output the start of its B [rank, out of the part], the row of A at which the
part begins, and its rank. Ranks may differ in every way; what a row costs is its own rank.
"""

from collections.abc import Sequence

import torch

CROWD = 4  # rows for each tile from which on tiles are few, and many rows share one adapter


def shrink(
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    tiles: torch.Tensor,
    *,
    height: int,
    features: int,
    width: int,
    norm: torch.Tensor | None = None,
    parts: int = 1,
) -> torch.Tensor:
    """A · x of the listed rows, as sums over pieces of the input [pieces, N, width + 1] in fp32.

    x [T, features]. `table` [slots, 2 + 3 * parts] int64 of this product, `rows` [N] int32, `tiles`
    [G, 3] int32: slot, first of `rows`, how many (at most `height`); tiles of slot 0 are empty.
    `norm` [features] fp32: the row enters as x · norm, and the last column gets its sum of x², by
    which `expand` divides. Ranks are at most `width`; columns beyond a row's rank are not written.
    `parts` is a hint: how many ranks of 16 there may be.
    """
    sums = torch.zeros((1, len(rows), width + 1), device=x.device)
    for slot, first, count in tiles.tolist():
        start, rank = table[slot, :2].tolist() if slot else (0, 0)
        if not rank:
            continue
        row = x[rows[first : first + count].long()].float()
        if norm is not None:
            sums[0, first : first + count, width] = row.square().sum(-1)
            row = row * norm
        a = arena[start : start + rank * features].view(rank, features)
        sums[0, first : first + count, :rank] = row.to(x.dtype).float() @ a.float().t()
    return sums


def expand(
    sums: torch.Tensor,
    y: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    tiles: torch.Tensor,
    *,
    height: int,
    features: int,
    outs: Sequence[int],
    eps: float | None = None,
) -> None:
    """Add B times the `sums` of `shrink` to the listed rows of y [T, Σ outs].

    `outs` are the output rows of each part, one after the other. `eps` belongs to the norm that
    `shrink` was given; the sums are divided by sqrt(mean(x²) + eps) then.
    """
    low = sums.sum(0)
    if eps is not None:
        low[:, :-1] *= torch.rsqrt(low[:, -1:] / features + eps)
    for slot, first, count in tiles.tolist():
        at = 0
        for part, out in enumerate(outs):
            start, begin, rank = table[slot, 2 + 3 * part : 5 + 3 * part].tolist()
            if slot and rank:
                b = arena[start : start + rank * out].view(rank, out)
                part_sums = low[first : first + count, begin : begin + rank]
                index = rows[first : first + count].long()
                change = part_sums.to(b.dtype).float() @ b.float()
                y[index, at : at + out] = (y[index, at : at + out].float() + change).to(y.dtype)
            at += out
