"""Changes by head: Triton in its interpreter against the twin, the twin against whole matrices."""

import numpy as np
import pytest
import torch

from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.kernels import lora_heads as twin
from kvrun.runtime.kernels.triton import lora_heads as fast
from kvrun.runtime.lora.resident import _shifted
from kvrun.runtime.lora.rows import tiled
from kvrun.runtime.lora.sites import Sites

HEADS, SIZE, FEATURES, NOPE = 3, 20, 72, 12
RANKS = [4, 17, 0]  # by slot, from 1
SLOTS = [1, 0, 2, 2, 3, 2, 1, 2, 2]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def adapters(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Where they lie, and the change B · A [HEADS * SIZE, FEATURES] of each slot."""
    torch.manual_seed(0)
    sites = Sites([(Shard("kv_b", HEADS * SIZE, FEATURES),)])
    flats, tables = [torch.full((8,), torch.nan)], [np.zeros((1, sites.width))]
    changes, start = [torch.zeros(HEADS * SIZE, FEATURES)], 8
    for rank in RANKS:
        layout = sites.lay_out({(0, 0): rank} if rank else {})
        flat = torch.full((layout.size,), torch.nan)
        changes.append(torch.zeros(HEADS * SIZE, FEATURES))
        if rank:
            a, b = sites.views(layout, flat, (0, 0))
            a.normal_(0, 0.3), b.normal_(0, 0.3)
            changes[-1] = b.to(dtype).float().t() @ a.to(dtype).float()
        flats.append(flat.to(dtype))
        tables.append(_shifted(layout.table, start))
        start += len(flat)
    rows, tiles = tiled(np.array(SLOTS), 3)
    empty = torch.zeros((2, 3), dtype=torch.int32)  # a captured step has room for more
    where = {
        "arena": torch.cat(flats).to(dtype),
        "table": torch.from_numpy(np.concatenate(tables)).long(),
        "rows": torch.from_numpy(rows),
        "tiles": torch.cat((torch.from_numpy(tiles), empty)),
    }
    return where, changes


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("module", [twin, fast], ids=["twin", "triton"])
def test_by_head(module: object, back: bool, dtype: torch.dtype) -> None:
    where, changes = adapters(dtype)
    first, width = (0, NOPE) if back else (NOPE, SIZE - NOPE)
    sizes = (width, FEATURES) if back else (FEATURES, width)
    x = torch.randn(len(SLOTS), HEADS, sizes[0] + 5).to(dtype)[..., : sizes[0]]
    y = torch.randn(len(SLOTS), HEADS, sizes[1] + 4).to(dtype)[..., : sizes[1]]
    wanted = y.float()
    for row, slot in enumerate(SLOTS):
        by_head = changes[slot].view(HEADS, SIZE, FEATURES)[:, first : first + width]
        product = "hn,hnk->hk" if back else "hk,hnk->hn"
        wanted[row] += torch.einsum(product, x[row].float(), by_head)
    module.by_head(  # type: ignore[attr-defined]
        x, y, **where, height=3, features=FEATURES, size=SIZE, first=first, back=back
    )
    assert (y.float() - wanted).norm() / wanted.norm() <= TOLERANCE[dtype]
