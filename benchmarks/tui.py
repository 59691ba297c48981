"""What the screen costs and how quickly it answers: `kvrun tui` in a pseudo-terminal.

python benchmarks/tui.py [--json] [PART ...]     parts: start echo engine paste long

* start: from the command to the first frame, and to the first token of a question typed at once
* echo: from a key press to its character, while four columns stream
* engine: the engine's steps/s under the screen, beside the same engine without one
* paste: 200 kB pasted into the prompt, until it stands there or is refused
* long: key presses while a server sends an answer of 64 kB into a column
"""

import argparse
import asyncio
import fcntl
import json
import os
import pty
import re
import select
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIZE = (40, 150)
# Characters that no answer holds, so that seeing one is seeing its key.
RARE = "ąćęłńśźżđħŋŧøþßæœðĸǫḋḟṁṗṡṫẁẅỳčďěňřšťůžőűğış"
GOALS = {
    "first_paint_s": 0.7, "first_token_s": 3.0, "echo_p95_ms": 50.0, "steps_share": 0.9,
    "paste_ms": 200.0, "long_echo_p95_ms": 100.0,
}  # fmt: skip


class Screen:
    """`kvrun tui WORDS` in a terminal of its own; `seen` is all it has written."""

    def __init__(self, *words: str) -> None:
        self.state = tempfile.TemporaryDirectory()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLORTERM": "truecolor",
            "XDG_STATE_HOME": self.state.name,
        }  # fmt: skip
        environment.pop("NO_COLOR", None)
        self.began = time.perf_counter()
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execve(sys.executable, [sys.executable, "-m", "kvrun", "tui", *words], environment)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        self.seen = b""

    def read(self, seconds: float) -> bytes:
        """What comes within that time, as soon as something comes."""
        if not select.select([self.fd], [], [], max(0.0, seconds))[0]:
            return b""
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:
            data = b""
        self.seen += data
        return data

    def until(self, pattern: str, seconds: float = 30.0, start: int | None = None) -> float:
        """The moment at which something is seen, after what has been seen so far."""
        at = len(self.seen) if start is None else start
        end = time.perf_counter() + seconds
        while not re.search(pattern.encode(), self.seen[at:]):
            if time.perf_counter() > end:
                raise SystemExit(f"nothing like {pattern!r} within {seconds} s")
            self.read(end - time.perf_counter())
        return time.perf_counter()

    def idle(self, seconds: float) -> None:
        """Let it run, taking in what it writes."""
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            self.read(left)

    def type(self, text: str) -> float:
        """Write keys; the moment at which they were."""
        now = time.perf_counter()
        data = text.encode()
        while data:
            select.select([], [self.fd], [], 1)
            data = data[os.write(self.fd, data[:4096]) :]
            self.read(0)
        return now

    def steps(self) -> tuple[int, float]:
        """The engine's step counter, as the panel shows it next, and when."""
        at = len(self.seen)
        when = self.until(r"total [\d,]+", start=at)
        return int(re.findall(rb"total ([\d,]+)", self.seen[at:])[-1].replace(b",", b"")), when

    def close(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
        end = time.perf_counter() + 5
        while time.perf_counter() < end and not os.waitpid(self.pid, os.WNOHANG)[0]:
            self.read(0.05)
        os.close(self.fd)
        self.state.cleanup()


def echoes(screen: Screen, seconds: float) -> list[float]:
    """Seconds from keys to their characters, one key after another."""
    times = []
    end = time.perf_counter() + seconds
    number = 0
    while time.perf_counter() < end:
        char = RARE[number % len(RARE)]
        if number and number % len(RARE) == 0:
            screen.type("\x01\x0b")  # to the start of the line, delete all of it
            screen.idle(0.3)
        at = len(screen.seen)
        sent = screen.type(char)
        times.append(screen.until(re.escape(char), start=at) - sent)
        number += 1
        screen.idle(0.07 + 0.013 * (number % 7))
    return times


def p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1] if len(values) > 1 else values[0]


def start() -> dict[str, float]:
    screen = Screen()
    painted = screen.until("prompt →", start=0) - screen.began
    at = len(screen.seen)
    screen.type("What is 12 + 30?\r")
    token = screen.until(r"\d+t ", start=at) - screen.began
    screen.close()
    return {"first_paint_s": painted, "first_token_s": token}


def _streaming(seconds: float) -> Screen:
    screen = Screen("-o", "ignore_eos=true", "-o", "max_tokens=1900")
    screen.until("prompt →", start=0)
    screen.until("float32|bfloat16", start=0)
    screen.type("Tell me a story about a fox.\r")
    screen.until("batch 4")
    return screen


def echo() -> dict[str, float]:
    screen = _streaming(10)
    times = echoes(screen, 8)
    screen.close()
    return {
        "echo_median_ms": 1000 * statistics.median(times), "echo_p95_ms": 1000 * p95(times),
        "echo_max_ms": 1000 * max(times), "echo_keys": len(times),
    }  # fmt: skip


def engine() -> dict[str, float]:
    """The same four streams with and without a screen, in turns: the machine may be busy."""
    with_screen, without = [], []
    for _ in range(3):
        without.append(asyncio.run(_bare(5)))
        screen = _streaming(10)
        first, began = screen.steps()
        screen.idle(5)
        last, ended = screen.steps()
        screen.close()
        with_screen.append((last - first) / (ended - began))
    share = statistics.median(with_screen) / statistics.median(without)
    return {
        "steps_s_with_screen": statistics.median(with_screen),
        "steps_s_without": statistics.median(without), "steps_share": share,
    }  # fmt: skip


async def _bare(seconds: float) -> float:
    sys.path.insert(0, str(ROOT))
    from kvrun.hub.local import adapters_of, resolve
    from kvrun.runtime.config import EngineConfig
    from kvrun.runtime.engine.client import EngineClient
    from kvrun.runtime.engine.request import Request
    from kvrun.runtime.sampling.params import SamplingParams
    from kvrun.runtime.text import Text

    folder = resolve("tiny")
    adapters = adapters_of("tiny")
    ids = Text(folder).chat([{"role": "user", "content": "Tell me a story about a fox."}])
    params = SamplingParams(max_tokens=1900, ignore_eos=True, temperature=0.7)
    async with EngineClient(EngineConfig(model=str(folder), adapters=adapters)) as client:

        async def stream(name: str | None) -> None:
            request = Request(id=str(name), prompt_ids=ids, params=params, adapter=name)
            async for _ in client.stream(request):
                pass

        tasks = [asyncio.create_task(stream(name)) for name in (None, *adapters)]
        await asyncio.sleep(0.7)
        first, began = (await client.stats()).steps, time.perf_counter()
        await asyncio.sleep(seconds)
        last, ended = (await client.stats()).steps, time.perf_counter()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return (last - first) / (ended - began)


def paste() -> dict[str, float]:
    screen = Screen()
    screen.until("prompt →", start=0)
    screen.until("float32|bfloat16", start=0)
    screen.idle(0.5)
    at = len(screen.seen)
    sent = screen.type("\x1b[200~" + "lorem ipsum dolor " * (200_000 // 18) + "\x1b[201~")
    refused = screen.until("too long", start=at) - sent
    at = len(screen.seen)
    sent = screen.type("\x1b[200~" + "lorem ipsum dolor " * 1800 + "\x1b[201~")
    accepted = screen.until("characters.]|pasted 1", start=at) - sent
    screen.close()
    return {"paste_ms": 1000 * refused, "paste_accepted_32kB_ms": 1000 * accepted}


class Long(BaseHTTPRequestHandler):
    """A server that sends 64 kB of Markdown in 10 seconds."""

    protocol_version = "HTTP/1.0"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._head("application/json")
        self.wfile.write(json.dumps({"data": [{"id": "long"}]}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._head("text/event-stream")
        block = "A **paragraph** of some words that has `code` in it and goes on a little.\n\n"
        block += (
            "* one item\n* another item\n\n```python\nfor i in range(10):\n    print(i)\n```\n\n"
        )
        text = (block * 400)[: 64 * 1024]
        for at in range(0, len(text), 64):
            event = {"choices": [{"delta": {"content": text[at : at + 64]}, "finish_reason": None}]}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.flush()
            time.sleep(0.0098)
        self.wfile.write(b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n')

    def _head(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()


def long() -> dict[str, float]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Long)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    screen = Screen("--url", f"http://127.0.0.1:{server.server_port}")
    screen.until("prompt →", start=0)
    screen.type("go\r")
    screen.until("paragraph")
    times = echoes(screen, 11)
    screen.close()
    server.shutdown()
    return {
        "long_echo_median_ms": 1000 * statistics.median(times),
        "long_echo_p95_ms": 1000 * p95(times), "long_echo_max_ms": 1000 * max(times),
    }  # fmt: skip


PARTS = {"start": start, "echo": echo, "engine": engine, "paste": paste, "long": long}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", help=" ".join(PARTS))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, float] = {}
    for name in arguments.parts or PARTS:
        found |= PARTS[name]()
        if not arguments.json:
            for key, value in found.items():
                goal = f"   (goal {GOALS[key]:g})" if key in GOALS else ""
                print(f"{key:<26} {value:10.2f}{goal}")
            found.clear() if name != list(arguments.parts or PARTS)[-1] else None
    load = os.getloadavg()[0]
    if arguments.json:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        print(json.dumps({"commit": commit, "cores": os.cpu_count(), "load": load, **found}))
    else:
        print(f"{os.cpu_count()} cores, load average {load:.1f}")


if __name__ == "__main__":
    main()
