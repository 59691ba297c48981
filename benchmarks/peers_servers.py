"""Servers for peers.py: kvrun's own and those that run already, all asked for the same.

A figure says something only if every server has read the same number of tokens and generated as
many as were asked for. So prompts are token ids where all servers take them, in words otherwise;
they are other ones on every turn, because servers keep the prompts they have read; and what a
server's own counts contradict ends the comparison.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from kvrun.bench import load, server
from kvrun.bench.completions import Asker, Outcome, Route, first_model
from kvrun.bench.workloads import HIGHEST_ID, Prompt, Workload
from kvrun.errors import InvalidRequest, KvrunError, Unreachable
from kvrun.http import Client

PATIENCE = 600.0  # seconds for a server to load its model
PROBE = 8  # tokens of the request that tries a server
Find = Callable[[str], Workload]


@dataclass
class Server:
    """One of them; a call takes its turn on a workload. `find` makes the workload of a name.

    Prompts are ids below `vocab`, or words where it is None. `process` is set for one that is
    started here, and its words lie in `log`. `read` is how many tokens the prompts of a workload
    had by its own count, on the last turn.
    """

    name: str
    url: str
    find: Find
    process: "subprocess.Popen[bytes] | None" = None
    log: Path | None = None
    model: str = ""
    vocab: int | None = None
    turn: int = 0
    read: dict[str, int] = field(default_factory=dict)
    noted: set[str] = field(default_factory=set)

    def __call__(self, name: str) -> float:
        """Seconds for all requests of a workload, all there at once. Ends the program otherwise."""
        self.turn += 1
        work = renewed(self.find(name), self.turn, self.vocab)
        run = load.Run()
        asyncio.run(self._ask(work, run))
        row = load.summary(run, {})
        if row["failed"]:
            self._end(f"{name}: {row['failed']} of {len(work.prompts)} requests failed", row)
        self.read[name] = row["total_input_tokens"]
        if row["tokens_by"] != "usage":
            self._note("it does not count tokens, and nobody else can say that answers are whole")
        elif row["total_output_tokens"] != work.total_output:
            self._end(
                f"{name}: {row['total_output_tokens']:,} tokens came of {work.total_output:,} asked"
                " for; its context has no room for them, or it does not know ignore_eos",
                row,
            )
        cached = row["total_cached_tokens"]
        if cached > self.read[name] // 10:
            self._note(f"{name}: it had {cached:,} of {self.read[name]:,} prompt tokens already")
        return float(row["duration"])

    def record(self) -> dict[str, Any]:
        """What a figure of it needs beside it."""
        return {
            "model": Path(self.model).name,  # llama.cpp lists the whole path of its file
            "prompts_as": "text" if self.vocab is None else "ids",
            "prompt_tokens": self.read,
        }

    def ready(self, vocab: int) -> bool:
        """Wait until it answers; False when it refuses ids, and takes words.

        Only what loads is waited for, by its 503; a server that is started here may not listen yet.
        Raises KvrunError.
        """
        until, random = time.monotonic() + PATIENCE, Random(0)
        prompts: list[Prompt] = [[random.randrange(vocab) for _ in range(PROBE)], "one two three"]
        while True:
            try:
                asyncio.run(self._try(prompts[0]))
                return len(prompts) == 2
            except InvalidRequest:
                if len(prompts) == 1:
                    raise
                prompts.pop(0)
            except KvrunError as error:
                if self.process and self.process.poll() is not None:
                    said = self.log.read_text(errors="replace")[-2000:] if self.log else ""
                    sys.exit(f"{self.name} has ended with code {self.process.returncode}\n{said}")
                starts = self.process is not None and isinstance(error, Unreachable)
                if time.monotonic() > until or not (starts or "HTTP 503" in error.cause):
                    raise
                if self.process is None:
                    self._note("it is not ready yet; waiting")
                time.sleep(0.3)

    async def _try(self, prompt: Prompt) -> None:
        with self._client() as client:
            route = Route.of(self.url)
            self.model = await first_model(client, route)
            await load.check(Asker(client, route, self.model), prompt)

    async def _ask(self, work: Workload, run: load.Run) -> None:
        with self._client() as client:
            asker = Asker(client, Route.of(self.url), self.model)
            await load.closed(asker, work, len(work.prompts), run, _nothing)

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        key = None if self.process else os.environ.get("OPENAI_API_KEY")
        client = Client(Route.of(self.url).address, api_key=key)
        try:
            yield client
        finally:
            client.close()

    def _note(self, text: str) -> None:
        if text not in self.noted:
            self.noted.add(text)
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def _end(self, what: str, row: dict[str, Any]) -> None:
        lines = [f"{self.name} at {self.url}, {what}", *server.failures(row["errors"])]
        sys.exit("\n".join(lines))


def renewed(work: Workload, turn: int, vocab: int | None) -> Workload:
    """The same lengths with the prompts of a turn; texts of a file stay what they are."""
    if vocab is None:
        return load.as_text(work, turn)
    random, ids = Random(turn), min(vocab, HIGHEST_ID + 1)
    prompts = [p if isinstance(p, str) else random.choices(range(ids), k=len(p))
               for p in work.prompts]  # fmt: skip
    return Workload(work.name, prompts, work.output_tokens)


def named(texts: Sequence[str], find: Find) -> list[Server]:
    """Of NAME=URL each. Raises InvalidRequest."""
    found: dict[str, Server] = {"kvrun": Server("kvrun", "", find)}
    for text in texts:
        name, _, url = text.partition("=")
        if not name or not url or name in found:
            raise InvalidRequest(
                f"--server: '{text}' is not NAME=URL with a name of its own.",
                hint="llama.cpp=http://127.0.0.1:8080; kvrun's own is started here",
            )
        Route.of(url)
        found[name] = Server(name, url, find)
    return list(found.values())[1:]


@contextlib.contextmanager
def side_by_side(
    others: Sequence[Server], folder: Path, dtype: str, vocab: int, find: Find
) -> Iterator[list[Server]]:
    """kvrun's own server and the others, once all are there. Raises KvrunError."""
    taken = [other.ready(vocab) for other in others]  # before kvrun's own is started for nothing
    with own(folder, dtype, find) as ours:
        servers = [ours, *others]
        ids = all([ours.ready(vocab), *taken])
        for one in servers:
            one.vocab = vocab if ids else None
            how = "ids" if ids else "words, since one takes no ids"
            one._note(f"ready with {Path(one.model).name}; prompts are {how}")
        yield servers


@contextlib.contextmanager
def own(folder: Path, dtype: str, find: Find) -> Iterator[Server]:
    """`kvrun serve` with the same model, to be asked as the others are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="kvrun-peers-") as place:
        log = Path(place) / "log"
        with log.open("wb") as words:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvrun", "serve", str(folder), "--port", str(port),
                 "--dtype", dtype],
                stdin=subprocess.DEVNULL, stdout=words, stderr=words,
            )  # fmt: skip
        try:
            yield Server("kvrun", f"http://127.0.0.1:{port}", find, process, log)
        finally:
            process.terminate()
            process.wait()


def unlike(servers: Sequence[Server]) -> list[str]:
    """A line for each workload whose prompts have not the same number of tokens everywhere."""
    lines = []
    for name in servers[0].read:
        counts = {one.name: one.read[name] for one in servers}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{count:,} for {who}" for who, count in counts.items())
            lines.append(f"{name}: tokens of the prompts are {said}")
    return lines


def _nothing(outcome: Outcome) -> None:
    """The counts of `Run` are enough."""
