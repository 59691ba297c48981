"""What becomes of the time when an adapter is loaded: from a folder in the page cache to the GPU.

`python benchmarks/lora_load.py [--stored F32] [--threads 12]`, without a GPU as far as that goes.
Random matrices of rank 16 on all seven products of Llama 3 8B: 448 tensors, 84 MB in bf16. Each
line is one load, in milliseconds: headers and checks (`open`), all of `read`, then, summed over its
threads, where they were: bytes into memory (`bytes`), `hash`, `spread` (scaled, rounded, checked,
turned, where they belong). On a GPU: from there to the device (`send`), and what pinning as much
memory would take (`pin`).
"""

import argparse
import gc
import json
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.device import native
from kvrun.runtime.kernels import spread
from kvrun.runtime.lora import adapter, pieces
from kvrun.runtime.lora.resident import Adapter, Resident
from kvrun.runtime.lora.sites import Sites

RANK, LAYERS, HIDDEN, INNER, KV = 16, 32, 4096, 14336, 1024
PHASES = {
    "bytes": (pieces.os, "preadv"), "hash": (pieces, "sha256"),
    "spread": (native("spread") or spread, "spread"),
}  # fmt: skip


def sites() -> Sites:
    """The products of the 8B shape."""
    found = []
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        q, k, v, o = (f"{name}self_attn.{part}_proj" for part in "qkvo")
        gate, up, down = (f"{name}mlp.{part}_proj" for part in ("gate", "up", "down"))
        found += [
            (Shard(q, HIDDEN, HIDDEN), Shard(k, KV, HIDDEN), Shard(v, KV, HIDDEN)),
            (Shard(o, HIDDEN, HIDDEN),),
            (Shard(gate, INNER, HIDDEN), Shard(up, INNER, HIDDEN)),
            (Shard(down, HIDDEN, INNER),),
        ]
    return Sites(found)


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Milliseconds by phase, of all threads together."""
    found: dict[str, float] = defaultdict(float)
    lock = threading.Lock()

    def timed(phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                return real(*args, **options)
            finally:
                with lock:
                    found[phase] += 1e3 * (time.perf_counter() - begun)

        return run

    kept = {phase: getattr(*where) for phase, where in PHASES.items()}
    for phase, where in PHASES.items():
        setattr(*where, timed(phase, kept[phase]))
    try:
        yield found
    finally:
        for phase, where in PHASES.items():
            setattr(*where, kept[phase])


def write_adapter(folder: Path, sites: Sites, dtype: torch.dtype = torch.bfloat16) -> None:
    """A PEFT folder of rank 16 on every product."""
    tensors = {}
    of_products = zip(sites.shards, sites.roles, strict=True)
    found = [shard for shards, role in of_products if role == "linear" for shard in shards]
    for shard in {shard.name: shard for shard in found}.values():
        name = f"base_model.model.{shard.name}"
        for side, size in (("A", (RANK, shard.in_features)), ("B", (shard.out_features, RANK))):
            tensors[f"{name}.lora_{side}.weight"] = torch.randn(size).mul_(0.01).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3 * RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def load(folder: Path, known: Sites, resident: Resident | None) -> dict[str, float]:
    begun = time.perf_counter()
    opened = adapter.AdapterFolder(folder, known)
    at_hand = time.perf_counter()
    with watched() as phases:
        flat, _ = opened.read(torch.bfloat16)
    read = time.perf_counter()
    found = {"open": 1e3 * (at_hand - begun), "read": 1e3 * (read - at_hand), **phases}
    if resident is not None:
        one = Adapter("one", opened, flat.nbytes, host=flat)
        assert resident.take_in(one)
        assert one.landed
        while not one.landed.query():
            time.sleep(1e-4)
        found["send"] = 1e3 * (time.perf_counter() - read)
        assert torch.equal(resident.arena[one.start : one.start + one.size].cpu(), flat)
        begun = time.perf_counter()
        torch.empty(flat.nbytes, dtype=torch.uint8, pin_memory=True)
        found["pin"] = 1e3 * (time.perf_counter() - begun)
        torch._C._host_emptyCache()  # the next one is pinned anew
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--stored", choices=("BF16", "F32"), default="BF16")
    parser.add_argument("--threads", type=int, default=pieces._THREADS)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    pieces._THREADS = args.threads
    known = sites()
    resident = None
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        resident = Resident(known, device=device, dtype=torch.bfloat16, room=1 << 30)
    gc.freeze()  # as the engine does in a process of its own
    with tempfile.TemporaryDirectory() as name:
        write_adapter(Path(name), known, pieces.DTYPES[args.stored])
        loads = [load(Path(name), known, resident) for _ in range(args.repeats)]
    for found in loads:
        print("  ".join(f"{phase} {ms:6.1f}" for phase, ms in found.items()), flush=True)
    whole = [found["open"] + found["read"] + found.get("send", 0.0) for found in loads]
    print(f"median {statistics.median(whole):.1f} ms, without the first step")


if __name__ == "__main__":
    main()
