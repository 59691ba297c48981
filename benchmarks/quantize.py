"""How long `kvrun quantize` takes, and how much of the host's memory.

`python benchmarks/quantize.py` makes a checkpoint of the 8B shape (16 GB of random weights, a file
for each layer), rounds it to int4, and solves GPTQ for its first 8 layers with 128 pieces of 512
tokens. Targets for 8B on one GPU: int4 in 60 s, GPTQ of all layers in 15 min, and one layer + 4 GB
of the host's memory beyond what a process with torch on the device has.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import psutil
import torch

from kvrun.bench import shapes
from kvrun.runtime.calibrate.job import Recipe, quantize
from kvrun.runtime.engine.start import choose_device

Shapes = dict[str, tuple[int, ...]]
# Values that are written again and again. An odd count, so that rows come out of step.
BLOCK = (8 << 20) + 4099


def layer_of(config: dict[str, int], n: int) -> Shapes:
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    p = f"model.layers.{n}"
    return {
        f"{p}.input_layernorm.weight": (hidden,),
        f"{p}.self_attn.q_proj.weight": (heads, hidden),
        f"{p}.self_attn.k_proj.weight": (kv, hidden),
        f"{p}.self_attn.v_proj.weight": (kv, hidden),
        f"{p}.self_attn.o_proj.weight": (hidden, heads),
        f"{p}.post_attention_layernorm.weight": (hidden,),
        f"{p}.mlp.gate_proj.weight": (inner, hidden),
        f"{p}.mlp.up_proj.weight": (inner, hidden),
        f"{p}.mlp.down_proj.weight": (hidden, inner),
    }


def outside(config: dict[str, int]) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    return found if config["tie_word_embeddings"] else {**found, "lm_head.weight": (vocab, hidden)}


def write(path: Path, tensors: Shapes, block: memoryview) -> None:
    """A safetensors file of bfloat16: norms of ones, matrices of the block over and over."""
    header, at = {}, 0
    for name, shape in tensors.items():
        end = at + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    with path.open("wb", buffering=0) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for place, shape in enumerate(tensors.values()):
            left, at = 2 * prod(shape), 2 * 1_000_003 * place % len(block)
            if len(shape) == 1:
                file.write(b"\x80\x3f" * shape[0])  # ones
                continue
            while left:
                done = file.write(block[at : at + left])
                left, at = left - done, (at + done) % len(block)


def make(folder: Path, shape: str, layers: int | None) -> dict[str, int]:
    """A checkpoint of random weights; its config.json."""
    with shapes.folder(shape) as found:
        config: dict[str, int] = json.loads((found / "config.json").read_text())
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    folder.mkdir()
    values = torch.randn(BLOCK).mul_(0.02).bfloat16()
    block = memoryview(values.view(torch.uint8).numpy().data)
    for n in range(config["num_hidden_layers"]):
        write(folder / f"layer-{n}.safetensors", layer_of(config, n), block)
    write(folder / "outside.safetensors", outside(config), block)
    describe(folder, config)
    return config


def first(folder: Path, whole: Path, config: dict[str, int], layers: int) -> dict[str, int]:
    """The same with fewer layers; files are shared."""
    config = {**config, "num_hidden_layers": min(layers, config["num_hidden_layers"])}
    folder.mkdir()
    for name in ("outside", *(f"layer-{n}" for n in range(config["num_hidden_layers"]))):
        (folder / f"{name}.safetensors").symlink_to(whole / f"{name}.safetensors")
    describe(folder, config)
    return config


def describe(folder: Path, config: dict[str, int]) -> None:
    where = dict.fromkeys(outside(config), "outside.safetensors")
    for n in range(config["num_hidden_layers"]):
        where |= dict.fromkeys(layer_of(config, n), f"layer-{n}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@contextmanager
def peak() -> Iterator[list[int]]:
    """Bytes of this process's memory beyond those at the start, at most, once it is left."""
    process, done, found = psutil.Process(), threading.Event(), [0]
    begun = process.memory_info().rss

    def look() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], process.memory_info().rss - begun)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def measure(
    folder: Path, recipe: Recipe, prompts: list[list[int]], device: str, layer_bytes: int
) -> float:
    """Seconds for a job, which is also printed with its memory."""
    out = folder.with_name(f"{folder.name}-{recipe.method}")
    with peak() as most:
        begun = time.perf_counter()
        quantize(folder, out, recipe, prompts, device=device)
        seconds = time.perf_counter() - begun
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    limit = layer_bytes + (4 << 30)
    print(
        f"{recipe.method}: {seconds:.1f} s, {size / 1e9:.2f} GB written; memory beyond the start: "
        f"{most[0] / 1e9:.2f} GB (one layer + 4 GB: {limit / 1e9:.2f})",
        flush=True,
    )
    shutil.rmtree(out)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", default="llama-3-8b", help="of kvrun.bench.shapes, a Llama's")
    parser.add_argument("--layers", type=int, help="of the checkpoint; default: the shape's")
    parser.add_argument("--gptq-layers", type=int, default=8, help="0: no GPTQ")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--group-size", type=int, help="default: 128")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where there is room for it; default: TMPDIR")
    args = parser.parse_args()
    device = choose_device(args.device)
    torch.zeros(1, device=device)
    with tempfile.TemporaryDirectory(dir=args.folder) as room:
        whole = Path(room) / "whole"
        begun = time.perf_counter()
        config = make(whole, args.shape, args.layers)
        total = config["num_hidden_layers"]
        size = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
        print(
            f"{args.shape}, {total} layers: {size / 1e9:.2f} GB made in "
            f"{time.perf_counter() - begun:.1f} s, on {device}",
            flush=True,
        )
        layer_bytes = 2 * sum(map(prod, layer_of(config, 0).values()))
        recipe = Recipe(str(whole), "int4", args.group_size)
        measure(whole, recipe, [], args.device, layer_bytes)
        if args.gptq_layers:
            folder = Path(room) / "part"
            part = first(folder, whole, config, args.gptq_layers)
            ids = torch.randint(config["vocab_size"], (args.samples, args.length)).tolist()
            recipe = Recipe(str(folder), "gptq", args.group_size)
            seconds = measure(folder, recipe, ids, args.device, layer_bytes)
            count = part["num_hidden_layers"]
            print(f"gptq of {total} layers: {seconds / count * total:.0f} s by those of {count}")


if __name__ == "__main__":
    main()
