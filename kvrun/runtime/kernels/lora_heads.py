"""Low-rank changes of many adapters to a matrix that is multiplied head by head, in plain torch.

The matrix [heads * size, features] is used in halves: some outputs of every head, from `first` on.
Rows, tiles, arena and table are those of `lora`; the matrix is the only part of its product.
"""

import torch


def by_head(
    x: torch.Tensor,
    y: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    tiles: torch.Tensor,
    *,
    height: int,
    features: int,
    size: int,
    first: int,
    back: bool,
) -> None:
    """Add to the listed rows of y [T, heads, out] what adapters change about x [T, heads, in].

    `out` are the outputs `first` : `first + out` of each head and `in` is `features`; or, going
    `back` through the transposed matrix, `in` are these outputs and `out` is `features`.
    """
    heads, width = x.shape[1], (x if back else y).shape[2]
    for slot, begin, count in tiles.tolist():
        start, rank, b_at = table[slot, :3].tolist() if slot else (0, 0, 0)
        if not rank:
            continue
        mine = rows[begin : begin + count].long()
        a = arena[start : start + rank * features].view(rank, features).float()
        b = arena[b_at : b_at + rank * heads * size].view(rank, heads, size).float()
        change = change_by_head(x[mine].float(), a, b[:, :, first : first + width], back)
        y[mine] = (y[mine].float() + change).to(y.dtype)


def change_by_head(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, back: bool) -> torch.Tensor:
    """x [T, heads, in], a [rank, features], b [rank, heads, outputs] -> [T, heads, out]"""
    if back:
        return torch.einsum("thn,rhn->thr", x, b) @ a
    return torch.einsum("thr,rhn->thn", x @ a.t(), b)
