"""A server that does what its script says."""

import asyncio
import json
from contextlib import suppress


class Stub:
    """An OpenAI-compatible server that does what `script` says.

    A script is a list of steps for the body of a completion: a dict is an event, bytes are sent as
    they are, "drop" closes the connection. Each step is a chunk of its own.
    """

    def __init__(self) -> None:
        self.script: list[dict | bytes | str] = []
        self.status = 200
        self.listing = 200  # the status of the list of models
        self.reply = b"{}"  # where the status is not 200
        self.type = "text/event-stream"
        self.keep = True
        self.models = ["stub"]
        self.requests: list[tuple[str, str, dict[str, str], dict]] = []
        self.connections = 0
        self._tasks: list[asyncio.Task] = []
        self.drop_before_answer = 0  # so many requests get their connection closed

    def answers(self, *texts: str, usage: int | None = None, chat: bool = False) -> None:
        """Script a good answer, one event for each text."""
        self.script = [event(text, chat) for text in texts]
        self.script.append(event("", chat, reason="length"))
        if usage is not None:
            counts = {"prompt_tokens": 7, "completion_tokens": usage}
            self.script.append({"choices": [], "usage": counts})
        self.script.append(b"data: [DONE]\n\n")

    def prepare(self, method: str, body: dict) -> None:
        """Before an answer; a server with a mind of its own changes what it will be."""

    @property
    def bodies(self) -> list[dict]:
        return [body for method, _, _, body in self.requests if method == "POST"]

    async def __aenter__(self) -> "Stub":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:  # of clients that have kept their connection
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks.append(asyncio.current_task())
        try:
            while await self._answer(reader, writer):
                pass
        except ConnectionError:
            pass  # the client has gone
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first = (await reader.readline()).decode().split()
        if not first:
            return False
        headers = {}
        while (line := (await reader.readline()).decode().strip()) != "":
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((first[0], first[1], headers, json.loads(body or b"{}")))
        if self.drop_before_answer:
            self.drop_before_answer -= 1
            return False
        self.prepare(first[0], self.requests[-1][3])
        if first[0] == "GET" and self.listing == 200:
            return self._send(writer, 200, json.dumps({"data": [{"id": m} for m in self.models]}))
        if first[0] == "GET":
            return self._send(writer, self.listing, self.reply.decode("latin-1"))
        if self.status != 200:
            return self._send(writer, self.status, self.reply.decode("latin-1"))
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: {self.type}\r\n"
            f"Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        for step in self.script:
            if step == "drop":
                return False
            data = step if isinstance(step, bytes) else b"data: " + json.dumps(step).encode()
            data += b"" if isinstance(step, bytes) else b"\n\n"
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return self.keep

    def _send(self, writer: asyncio.StreamWriter, status: int, text: str) -> bool:
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        return True


def event(text: str, chat: bool = False, reason: str | None = None) -> dict:
    """A piece of an answer as OpenAI sends it."""
    piece = {"delta": {"content": text}} if chat else {"text": text}
    return {"choices": [{"index": 0, **piece, "finish_reason": reason}]}


class Llama(Stub):
    """Behaves like llama.cpp's server, as it was seen to do (ggml 0.25.3).

    The list of models gives a path, and 503 while it loads; ids outside the vocabulary and prompts
    longer than the context get 400; an answer for which there is no room ends early, with the
    reason "length"; usage comes in the last event of the answer, not in one of its own.
    """

    def __init__(self, vocab: int = 4096, context: int = 64) -> None:
        super().__init__()
        self.models = ["/models/tiny-f32.gguf"]
        self.vocab, self.context = vocab, context
        self.loading = 0  # so many requests come too early
        self.takes_ids, self.counts = True, True
        self.cached = 0

    def prepare(self, method: str, body: dict) -> None:
        self.listing = self.status = 200
        if self.loading:
            self.loading -= 1
            self._refuse(503, "Loading model")
        elif method == "POST":
            self._complete(body["prompt"], body["max_tokens"])

    def _complete(self, prompt: str | list[int], asked: int) -> None:
        if isinstance(prompt, list) and not self.takes_ids:
            return self._refuse(400, "prompt must be a string")
        if isinstance(prompt, list) and max(prompt) >= self.vocab:
            return self._refuse(400, "Prompt contains invalid tokens")
        length = len(prompt.split()) + 1 if isinstance(prompt, str) else len(prompt)
        if length >= self.context:
            text = f"request ({length} tokens) exceeds the available context size ({self.context}"
            return self._refuse(400, f"{text} tokens), try increasing it")
        tokens = min(asked, self.context - length)
        self.script = [event("a") for _ in range(tokens)]
        last = event("", reason="length")
        details = {"cached_tokens": self.cached}
        usage = {"prompt_tokens": length, "completion_tokens": tokens}
        if self.counts:
            last["usage"] = usage | {"prompt_tokens_details": details}
        self.script += [last, b"data: [DONE]\n\n"]
        return None

    def _refuse(self, status: int, text: str) -> None:
        self.listing = self.status = status
        self.reply = json.dumps({"error": {"code": status, "message": text}}).encode()
