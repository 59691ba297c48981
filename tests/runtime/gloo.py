"""A rank that is a process of its own: sums go over gloo, as between machines without NVLink."""

import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kvrun.runtime.parallel import Group
from tests.runtime.driver import Driver

PROMPT = list(range(3, 20))


@dataclass(frozen=True)
class Processes(Group):
    """Ranks of torch's default process group."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total


def logits(driver: Driver) -> torch.Tensor:
    """Of a prompt's first tokens in one step, and of its last two one by one."""
    rows = driver.step([(0, PROMPT[:-2])])
    for token in PROMPT[-2:]:
        rows += driver.step([(0, [token])])
    return torch.cat(rows)


def main(rank: int, size: int, meeting: Path, folders: list[Path]) -> None:
    """Write every model's logits as this rank finds them beside its folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(meeting), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    for folder in folders:
        found = logits(Driver(folder, group=Processes(rank, size)))
        torch.save(found, folder.with_suffix(f".{rank}"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), [Path(p) for p in sys.argv[4:]])
