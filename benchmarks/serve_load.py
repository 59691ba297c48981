"""kvrun serve under load, with the clients in a second process: what it holds, costs and leaks.

    python benchmarks/serve_load.py [layer hold overhead overload leak planted]

layer     the HTTP process alone, on an engine that only counts: events/s, 1,000 streams at once
hold      1,000 streams of 32 tokens at once on the built-in model
overhead  32 clients in a closed loop, beside the same engine without HTTP
overload  three times as many requests as can be served, for 20 seconds, with 192 places
leak      5,000 requests, half of whose clients leave at a random token: pages and memory
planted   the same with a server that keeps 4 kB of every request; it must be found out
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
DONE = b"data: [DONE]"
USAGE = re.compile(rb'"completion_tokens":(\d+)')
COUNTING = """
import asyncio, kvrun.runtime.engine.client as client
from kvrun.runtime.engine.request import Delta, Ready, Stats

class Counting:
    '''One token for every request every 20 ms, and nothing computed.'''
    def __init__(self, config): self.queues = {}
    async def start(self):
        self.task = asyncio.create_task(self.run())
        return Ready(plan="none", max_model_len=2048, vocab_size=4096, kv_tokens=1 << 20,
            block_size=16, device="cpu", dtype="float32", attention="none", load_seconds=0.0)
    async def run(self):
        while True:
            await asyncio.sleep(0.02)
            for queue in list(self.queues.values()): queue.put_nowait(None)
    async def stream(self, request):
        queue = self.queues[request.id] = asyncio.Queue()
        last = request.params.max_tokens
        try:
            for count in range(1, last + 1):
                await queue.get()
                yield Delta(request_id=request.id, token_ids=[300 + count % 100],
                    finish_reason="length" if count == last else None)
        finally:
            del self.queues[request.id]
    async def abort(self, request_id, index=None): pass
    async def ended(self): return await asyncio.Event().wait()
    async def stats(self): return Stats(blocks_active=len(self.queues))
    async def close(self): self.task.cancel()

client.EngineClient = Counting
"""
LEAKING = """
import kvrun.server.generation as generation
kept, measure = [], generation.Generation._measure
def keep(self):
    kept.append(bytearray(4096))
    measure(self)
generation.Generation._measure = keep
"""


@dataclass
class Server:
    port: int
    process: "psutil.Popen"

    def memory(self) -> float:
        """MiB of the HTTP process alone."""
        return float(self.process.memory_info().rss) / 2**20

    def metric(self, name: str) -> float:
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode()
        return float(next(li for li in text.splitlines() if li.startswith(name + " ")).split()[1])


@contextmanager
def served(*words: str, patch: str = "") -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"{patch}\nfrom kvrun.cli import main\nmain()"
    command = [sys.executable, "-c", code, "serve", "tiny", "-p", str(port), *words]
    with open(os.devnull, "wb") as nothing:
        process = psutil.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=nothing)
    server = Server(port, process)
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            break
        except OSError:
            if process.poll() is not None:
                raise SystemExit("the server has not started") from None
            time.sleep(0.05)
    try:
        yield server
    finally:
        process.terminate()
        process.wait()


@dataclass
class Seen:
    """What one request has brought."""

    status: int = 0
    began: float = 0.0
    times: list[float] = field(default_factory=list)  # of its tokens
    tokens: int = 0  # as the last event says; some tokens have no text, and no event
    complete: bool = False
    error: str = ""
    seconds: float = 0.0

    @property
    def first(self) -> float:
        return self.times[0] - self.began if self.times else float("nan")


async def ask(port: int, tokens: int, *, leave_after: int | None = None, n: int = 0) -> Seen:
    """One streamed completion over a connection of its own; leaves early if told to."""
    body = json.dumps(
        {
            "prompt": f"Once upon a time, number {n},", "max_tokens": tokens, "stream": True,
            "ignore_eos": True, "temperature": 0, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    seen = Seen(began=time.perf_counter())
    writer = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            head + b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
        )
        status = await reader.readline()
        seen.status = int(status.split()[1])
        async for data in _chunks(reader):
            now = time.perf_counter()
            seen.times += [now] * data.count(b'"text":"')
            if usage := USAGE.search(data):
                seen.tokens = int(usage[1])
            seen.complete = seen.complete or DONE in data
            if leave_after is not None and len(seen.times) >= leave_after:
                break
    except (OSError, ValueError, IndexError) as error:
        seen.error = repr(error)
    finally:
        if writer is not None:
            writer.transport.abort() if leave_after is not None else writer.close()
    seen.seconds = time.perf_counter() - seen.began
    return seen


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(1 << 16):
        yield data


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def say(name: str, good: bool, text: str) -> bool:
    print(f"{'ok  ' if good else 'MISS'} {name:9} {text}", flush=True)
    return good


# -- the runs ---------------------------------------------------------------------------------


def layer() -> bool:
    with served(patch=COUNTING) as server:
        before, started = server.memory(), sum(server.process.cpu_times()[:2])
        began = time.perf_counter()
        seen = asyncio.run(_all(server.port, 1000, 50))
        seconds = time.perf_counter() - began
        after = server.memory()
        busy = sum(server.process.cpu_times()[:2]) - started
    whole = sum(one.complete for one in seen)
    rate = sum(len(one.times) for one in seen) / seconds
    return say(
        "layer",
        whole == 1000 and rate >= 10_000,
        f"{whole}/1000 streams of 50, {rate:,.0f} events/s ({seconds:.1f} s, "
        f"{rate * seconds / busy:,.0f} for each of the server's own seconds), first token p99 "
        f"{percentile([one.first for one in seen], 0.99):.2f} s, {before:.0f} -> {after:.0f} MiB",
    )


async def _all(port: int, clients: int, tokens: int) -> list[Seen]:
    return await asyncio.gather(*(ask(port, tokens, n=n) for n in range(clients)))


def hold() -> bool:
    with served() as server:
        began = time.perf_counter()
        seen = asyncio.run(_all(server.port, 1000, 32))
        seconds = time.perf_counter() - began
        memory, leaked = server.memory(), server.metric("kvrun_kv_blocks_used")
    whole = sum(one.complete and one.tokens == 32 for one in seen)
    firsts = [one.first for one in seen]
    return say(
        "hold",
        whole == 1000 and leaked == 0,
        f"{whole}/1000 streams of 32, {32 * whole / seconds:,.0f} tokens/s, first token p99 "
        f"{percentile(firsts, 0.99):.1f} s, HTTP process {memory:.0f} MiB, {leaked:.0f} pages left",
    )


async def _closed(one: Callable[[int], Any], clients: int, requests: int) -> float:
    """Seconds for `requests` by `clients` that each ask again at once."""
    numbers = iter(range(requests))

    async def client() -> None:
        for number in numbers:
            await one(number)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began


CLIENTS, REQUESTS, TOKENS = 32, 192, 64


async def _engine_alone() -> float:
    """Tokens/s of the same engine in its own process, without HTTP and without text."""
    from kvrun.hub.local import resolve
    from kvrun.runtime.config import EngineConfig
    from kvrun.runtime.engine.client import EngineClient
    from kvrun.runtime.engine.request import Request
    from kvrun.runtime.sampling.params import SamplingParams
    from kvrun.runtime.text import Text

    text = Text(resolve("tiny"))
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    async with EngineClient(EngineConfig(model=str(resolve("tiny")))) as client:

        async def one(number: int) -> None:
            ids = text.encode(f"Once upon a time, number {number},")
            async for _ in client.stream(Request(id=str(number), prompt_ids=ids, params=params)):
                pass

        await _closed(one, CLIENTS, CLIENTS)
        return REQUESTS * TOKENS / await _closed(one, CLIENTS, REQUESTS)


async def _served_alone(port: int) -> float:
    async def one(number: int) -> None:
        seen = await ask(port, TOKENS, n=number)
        assert seen.complete, seen

    await _closed(one, CLIENTS, CLIENTS)
    return REQUESTS * TOKENS / await _closed(one, CLIENTS, REQUESTS)


def overhead() -> bool:
    pairs = []
    for _ in range(3):  # taking turns, so that a busy machine is busy for both
        alone = asyncio.run(_engine_alone())
        with served() as server:
            over_http = asyncio.run(_served_alone(server.port))
        pairs.append((alone, over_http))
    costs = [1 - http / alone for alone, http in pairs]
    shown = ", ".join(f"{alone:,.0f} / {http:,.0f}" for alone, http in pairs)
    cost = statistics.median(costs)
    return say(
        "overhead",
        cost <= 0.15,
        f"{cost:.1%} at {CLIENTS} clients (engine / HTTP, tokens/s: {shown})",
    )


def overload() -> bool:
    tokens, places, seconds = 32, 192, 20.0
    with served("--max-concurrent-requests", str(places), "--max-batch-size", "64") as server:
        took = asyncio.run(_closed(lambda n: ask(server.port, tokens, n=n), 64, 256))
        capacity = 256 / took
        seen = asyncio.run(_open(server.port, 3 * capacity, seconds, tokens))
    accepted = [one for one in seen if one.status == 200]
    refused = [one for one in seen if one.status == 429]
    whole = sum(one.complete for one in accepted)
    slow = percentile([one.seconds for one in refused], 0.99)
    other = len(seen) - len(accepted) - len(refused)
    return say(
        "overload",
        whole == len(accepted) and not other and bool(refused) and slow < 0.1,
        f"{3 * capacity:.0f} requests/s for {seconds:.0f} s: {whole}/{len(accepted)} accepted ones "
        f"complete, {len(refused)} times 429 (p99 {1000 * slow:.0f} ms), {other} others",
    )


async def _open(port: int, rate: float, seconds: float, tokens: int) -> list[Seen]:
    draw, tasks = random.Random(0), []
    end = due = time.perf_counter()
    end += seconds
    while due < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(port, tokens, n=len(tasks))))
        due += draw.expovariate(rate)
    return await asyncio.gather(*tasks)


def leak(patch: str = "", requests: int = 5000) -> bool:
    draw, memory = random.Random(0), []
    with served(patch=patch) as server:

        async def one(number: int) -> None:
            leaves = draw.randint(1, 15) if number % 2 else None
            await ask(server.port, 16, leave_after=leaves, n=number % 50)

        for _ in range(5):
            asyncio.run(_closed(one, 32, requests // 5))
            while used := server.metric("tgi_batch_current_size"):
                time.sleep(0.05)
            memory.append(server.memory())
        used = server.metric("kvrun_kv_blocks_used")
        leaked = server.metric("kvrun_kv_page_leak")
        dropped = server.metric('tgi_request_failure{err="dropped"}')
    slope = (memory[4] - memory[2]) / (2 * requests / 5 / 1000)
    good = not used and not leaked and slope <= 1.0
    shown = " ".join(f"{value:.1f}" for value in memory)
    text = (
        f"{requests} requests, {dropped:.0f} left early: {used:.0f} pages leaked, "
        f"{slope:+.2f} MiB per 1,000 requests ({shown} MiB)"
    )
    return say("leak", good, text) if not patch else say("planted", slope > 1.0, text)


def planted() -> bool:
    return leak(LEAKING)


RUNS = {run.__name__: run for run in (layer, hold, overhead, overload, leak, planted)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    load, version = psutil.getloadavg()[0], sys.version.split()[0]
    print(f"{psutil.cpu_count()} cores, load {load:.1f}, Python {version}")
    results = [RUNS[name]() for name in parser.parse_args().runs]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
