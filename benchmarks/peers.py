"""The same work on kvrun and on its peers, turn by turn: tokens/s, and each as a share of kvrun's.

    python benchmarks/peers.py                                        kvrun and what is installed
    python benchmarks/peers.py --shape llama-3-8b -w mixed256 --peers kvrun vllm
    python benchmarks/peers.py --server llama.cpp=http://127.0.0.1:8080 -w 32/128x8

A workload is one that `kvrun bench throughput` knows, with xN for N requests. Libraries (kvrun,
transformers, vllm) run in processes of their own, which hold the model and wait while another's
turn is on, each with an even share of a GPU's memory; the median of the turns counts, because the
speed of a shared machine drifts. Prompts are token ids, answers greedy, end of text ignored, no
prefix cache. A --server runs already, with the same model; it is asked over HTTP as `kvrun bench
load` does, with every request at once, and `kvrun serve` beside it (peers_servers.py).
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers_servers
import torch

from kvrun.bench import plot, shapes
from kvrun.bench.roofline import WIDTHS, Cost
from kvrun.bench.workloads import Workload, find
from kvrun.errors import KvrunError
from kvrun.hub.local import resolve
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.plan import examine, size

LIBRARIES = ("kvrun", "transformers", "vllm")
USUAL = ("32/128x1", "32/128x8", "128/64x32")
ROWS = 64  # sequences in a batch of transformers
SHARED = 0.9  # of a GPU's memory, by all engines
RESERVE = 5 << 30  # bytes that kvrun takes beside weights and cache: 5.0 GB on an H100 (0.6B)
Run = Callable[[Workload], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a folder, a built-in model, ORG/NAME")
    parser.add_argument("--shape", help=f"random weights instead: {', '.join(shapes.SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("-w", "--workload", nargs="+", default=list(USUAL))
    parser.add_argument("--peers", nargs="+", choices=LIBRARIES, help="default: what is installed")
    parser.add_argument("--server", nargs="+", default=[], metavar="NAME=URL")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--longest", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(served=[])
    options = parser.parse_args()
    if options.child:
        serve_turns(options.child, options)
        return
    if options.server and (options.peers or options.shape):
        parser.error("--server compares servers with `kvrun serve`: no --peers, and no --shape")
    try:
        report(compared(options), options)
    except KvrunError as error:
        sys.exit(f"error: {error}")


def compared(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all workloads."""
    works = {name: workload(name) for name in options.workload}
    with contextlib.ExitStack() as stack:
        folder = Path(options.model) if options.shape is None else None
        if options.shape is not None:
            folder = stack.enter_context(shapes.folder(options.shape))
        elif not folder or not folder.is_dir():
            folder = resolve(options.model)
        options.longest = max(map(tokens_of, works.values()))
        peers = peers_of(options, folder, stack)
        return [row for name in works for row in compare(name, works[name], peers, options.turns)]


def tokens_of(work: Workload) -> int:
    """Of the longest prompt with its answer; a text has no more of them than characters."""
    return max(len(prompt) + answer for prompt, answer in work.requests())


def context_of(longest: int, most: int | None) -> int:
    """What engines are limited to: rounded up, but no more than the model was made for."""
    return min(-(-longest // 256) * 256, most or sys.maxsize)


def share_of(engines: int) -> float:
    """Of a GPU's memory, for each."""
    return SHARED / engines


def cache_bytes(share: float, total: int, free: int, weights: int) -> int:
    """What a share of `total` leaves for the cache, where `free` bytes are there; not above 0 when
    the weights fill it."""
    return min(int(share * total), free) - weights - RESERVE


def workload(text: str) -> Workload:
    name, count = re.fullmatch(r"(.+?)(?:x(\d+))?", text).groups()  # type: ignore[union-attr]
    if name.startswith("prefill"):  # its name ends in x and a number
        return find(text)
    return find(name, count=int(count) if count else None)


def peers_of(
    options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack
) -> dict[str, Callable[[str], float]]:
    """What takes turns: name -> seconds for a workload. Raises KvrunError."""
    if options.server:
        others = peers_servers.named(options.server, workload)
        vocab = HFConfig.read(folder).integer("vocab_size")
        beside = peers_servers.side_by_side(others, folder, options.dtype, vocab, workload)
        options.served = stack.enter_context(beside)
        return {server.name: server for server in options.served}
    wanted = options.peers or [n for n in LIBRARIES if importlib.util.find_spec(n)]
    if options.shape is not None and options.peers is None and "transformers" in wanted:
        wanted.remove("transformers")  # it has no way to begin with random weights on the device
    missing = [name for name in wanted if not importlib.util.find_spec(name)]
    if missing:
        sys.exit(f"not installed here: {', '.join(missing)}; pip install it, or name others")
    argv = ["--model", str(folder), "--dtype", options.dtype]
    if wanted and torch.cuda.is_available():
        most = HFConfig.read(folder).get("max_position_embeddings")
        argv += ["--longest", str(context_of(options.longest, most))]
        argv += ["--share", str(share_of(len(wanted)))]
    argv += ["--shape", options.shape] if options.shape else []
    found: dict[str, Callable[[str], float]] = {}
    for name in wanted:
        found[name] = stack.enter_context(child(name, argv))
    return found


def compare(
    name: str, work: Workload, peers: dict[str, Callable[[str], float]], turns: int
) -> Iterator[dict[str, Any]]:
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    for turn in range(turns + 1):
        for peer, run in peers.items():
            took = run(name)
            if turn:  # the first one is not counted
                seconds[peer].append(took)
    rates = {peer: work.total_output / statistics.median(s) for peer, s in seconds.items()}
    for peer, rate in rates.items():
        spread = [work.total_output / s for s in seconds[peer]]
        share = rate / rates["kvrun"] if "kvrun" in rates else float("nan")
        print(f"{name:16} {peer:14} {rate:10,.0f} tok/s  {share:6.2f} of kvrun", flush=True)
        yield {
            "workload": name, "peer": peer, "output_tokens_per_s": round(rate, 1),
            "of_kvrun": round(share, 3), "slowest": round(min(spread), 1),
            "fastest": round(max(spread), 1),
        }  # fmt: skip


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    name = options.shape or Path(options.model).name
    about = f"{name}, {options.dtype}, {platform.processor() or f'{os.cpu_count()} processors'}"
    for line in peers_servers.unlike(options.served) if options.served else ():
        print(line, file=sys.stderr)
    if options.json:
        record = {
            "model": name,
            "dtype": options.dtype,
            "cpus": os.cpu_count(),
            "turns": options.turns,
            "versions": versions(),
            **({"servers": {s.name: s.record() for s in options.served}} if options.served else {}),
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.plot:
        bars = [
            plot.Bar(f"{r['workload']} {r['peer']}", r["output_tokens_per_s"], group=r["peer"])
            for r in rows
        ]
        plot.save(options.plot, plot.svg("Generated tokens/s, more is better", about, bars))


def versions() -> dict[str, str]:
    known = ("kvrun", "torch", "transformers", "vllm")
    found = {}
    for name in known:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# -- a library in a process of its own ------------------------------------------------------


@contextlib.contextmanager
def child(name: str, argv: list[str]) -> Iterator[Callable[[str], float]]:
    """Workload names go in, a line each; seconds come out. It is there when the model is."""
    environment = dict(os.environ)
    if name == "vllm" and not importlib.util.find_spec("flashinfer"):
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # which it takes for granted
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", name, *argv],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout

    def answer() -> float:
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            sys.exit(f"{name} has ended with code {process.wait()}")
        return float(line)

    def run(work: str) -> float:
        print(work, file=process.stdin, flush=True)
        return answer()

    try:
        print(f"{name} is ready after {answer():.1f} s", file=sys.stderr, flush=True)
        yield run
    finally:
        process.stdin.close()
        process.wait()


def serve_turns(name: str, options: argparse.Namespace) -> None:
    """The child: the model is loaded once, then one line per turn."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    vocab = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    begun = time.perf_counter()
    run = OPEN[name](options)
    print(time.perf_counter() - begun, file=answers, flush=True)
    for line in sys.stdin:
        work = workload(line.strip()).within(vocab)
        begun = time.perf_counter()
        run(work)
        print(time.perf_counter() - begun, file=answers, flush=True)


def open_kvrun(options: argparse.Namespace) -> Run:
    from kvrun import LLM, SamplingParams

    limits: dict[str, Any] = {}
    free = total = 0
    if options.share is not None:
        free, total = torch.cuda.mem_get_info()
        weights = weight_bytes(options)
        room = cache_bytes(options.share, total, free, weights)
        if room <= 0:
            sys.exit(
                f"weights of {size(weights)} leave no room for a cache in {options.share:.0%} of "
                f"{size(total)}, of which {size(free)} are free"
            )
        limits = {"max_model_len": options.longest, "kv_memory": room}
    llm = LLM(
        options.model, dtype=options.dtype, prefix_caching=False, load_format=load_format(options),
        **limits,
    )  # fmt: skip
    if options.share is not None:
        held = free - torch.cuda.mem_get_info()[0]
        print(f"kvrun holds {size(held)}, its share is {size(int(options.share * total))}")

    def run(work: Workload) -> None:
        params = [
            SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in work.output_tokens
        ]
        outputs = llm.generate(list(work.prompts), params)
        assert [len(o.token_ids) for o in outputs] == list(work.output_tokens)

    return run


def load_format(options: argparse.Namespace) -> str:
    return "auto" if options.shape is None else "dummy"


def weight_bytes(options: argparse.Namespace) -> int:
    """What the weights take on the device: a shape has no files to ask."""
    width = WIDTHS.get(options.dtype)  # none of "auto": as they are stored
    if options.shape is not None:
        return Cost.of(HFConfig.read(Path(options.model))).parameters * (width or 2)
    facts = examine(options.model)
    if facts.parameters is None or width is None:
        return facts.stored_bytes
    return facts.parameters * width


def open_transformers(options: argparse.Namespace) -> Run:
    """Batches of prompts of similar lengths, padded on the left; each goes on to its longest
    answer, as `generate` does."""
    import transformers

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.share is not None:
        torch.cuda.set_per_process_memory_fraction(options.share)
    dtype = getattr(torch, options.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    model = model.to(device)
    model.generation_config = transformers.GenerationConfig(do_sample=False)

    def run(work: Workload) -> None:
        requests: list[Any] = sorted(work.requests(), key=lambda r: r[1])
        for start in range(0, len(requests), ROWS):
            some = requests[start : start + ROWS]
            width = max(len(ids) for ids, _ in some)
            ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in some], device=device)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p, _ in some], device=device
            )
            longest = max(n for _, n in some)
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=mask, max_new_tokens=longest, pad_token_id=0
                )
            assert out.shape[1] == width + longest

    return run


def open_vllm(options: argparse.Namespace) -> Run:
    from vllm import LLM, SamplingParams

    limits: dict[str, Any] = {}
    if options.share is not None:
        limits = {"max_model_len": options.longest, "gpu_memory_utilization": options.share}
    llm = LLM(
        options.model, dtype=options.dtype, enable_prefix_caching=False,
        load_format=load_format(options), skip_tokenizer_init=True, **limits,
    )  # fmt: skip

    def run(work: Workload) -> None:
        params = [
            SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False)
            for n in work.output_tokens
        ]
        prompts: Any = [{"prompt_token_ids": p} for p in work.prompts]
        llm.generate(prompts, params, use_tqdm=False)

    return run


OPEN = {"kvrun": open_kvrun, "transformers": open_transformers, "vllm": open_vllm}


if __name__ == "__main__":
    main()
