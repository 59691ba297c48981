"""kvrun serve on a shape with random weights: what `bench load` gets of what the engine gives.

    python benchmarks/serve_shape.py [--shape llama-3-8b] [--concurrency 64] [--workload 512/256]

Takes turns between `kvrun bench throughput` (the engine in its own process, no text, no HTTP) and
`kvrun bench load` on a server of the same shape, with as many sequences at once. The server has a
tokenizer with an entry for every id, so that every token is text and an event.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvrun.bench import shapes

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
# What `kvrun serve` has no option for, because nobody but this file wants it.
RANDOM_WEIGHTS = """
import kvrun.runtime.config as config
Whole = config.EngineConfig
config.EngineConfig = lambda **options: Whole(load_format="dummy", **options)
"""


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Bytes, and words of digits for all other ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"Ġ{n}" for n in range(vocab_size - len(letters)))]
    model = models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))


def run(*words: str) -> dict[str, Any]:
    """The one result of a `kvrun bench`."""
    command = [sys.executable, "-m", "kvrun", "bench", *words, "-o", "json", "--no-progress"]
    done = subprocess.run(command, env=ENV, stdout=subprocess.PIPE, text=True, check=True)
    [row] = json.loads(done.stdout)["results"]
    return dict(row)


@contextlib.contextmanager
def served(folder: Path, concurrency: int, longest: int) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"{RANDOM_WEIGHTS}\nfrom kvrun.cli import main\nmain()"
    options = {"-p": port, "--max-batch-size": concurrency, "--max-total-tokens": longest}
    words = [str(word) for pair in options.items() for word in pair]
    log = folder / "serve.log"
    with log.open("wb") as out:
        command = [sys.executable, "-c", code, "serve", str(folder), *words]
        process = subprocess.Popen(command, env=ENV, stderr=out)
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            if process.poll() is not None:
                raise SystemExit(f"the server has not started:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3-8b", choices=list(shapes.SHAPES))
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--workload", default="512/256", help="INPUT/OUTPUT tokens")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--turns", type=int, default=2)
    asked = parser.parse_args()
    vocab = shapes.SHAPES[asked.shape]["vocab_size"]
    longest = sum(map(int, asked.workload.split("/"))) + 16
    work = ["-w", asked.workload, "-n", str(asked.requests)]
    alone, http = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "config.json").write_text(json.dumps(shapes.SHAPES[asked.shape]))
        write_tokenizer(folder, vocab)
        for turn in range(asked.turns):
            seed = ["--seed", str(turn + 1)]
            engine = ["-e", f"max_num_seqs={asked.concurrency}", "--max-model-len", str(longest)]
            row = run("throughput", "--shape", asked.shape, *work, *seed, *engine, "-r", "2",
                      "--no-roofline")  # fmt: skip
            alone.append(row["output_throughput"])
            with served(folder, asked.concurrency, longest) as url:
                load = [url, "-c", str(asked.concurrency), "--vocab", str(vocab), *work]
                run("load", *load, "--seed", str(turn + 100))
                row = run("load", *load, *seed)
                http.append(row["output_throughput"])
            print(
                f"{asked.shape}, {asked.concurrency} at once, {asked.workload}: engine "
                f"{alone[-1]:,.0f}, over HTTP {http[-1]:,.0f} tokens/s ({row['completed']} done, "
                f"{row['failed']} failed, TTFT {row['median_ttft_ms']:.0f} ms, TPOT "
                f"{row['median_tpot_ms']:.2f} ms)",
                flush=True,
            )
    lost = 1 - statistics.median(http) / statistics.median(alone)
    print(f"{'ok  ' if lost <= 0.05 else 'MISS'} over HTTP {lost:+.1%} are lost")
    sys.exit(0 if lost <= 0.05 else 1)


if __name__ == "__main__":
    main()
