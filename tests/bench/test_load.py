"""Load on a server that follows a script: what is asked, what is counted, what goes wrong how."""

import asyncio
import json
import math
import random
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from kvrun.bench import load, workloads
from kvrun.bench.completions import Asker, Outcome, Route, first_model
from kvrun.bench.load import Run
from kvrun.bench.server import failures
from kvrun.errors import InvalidRequest, KvrunError, NotFound, Unreachable
from kvrun.http import Address, Client
from tests.bench.stub import Llama, Stub, event

Ask = Callable[..., Asker]
WORK = workloads.uniform(6, 4, 3)


@pytest.fixture
async def clients() -> AsyncIterator[list[Client]]:
    """Clients that a test has made; their connections are let go of after it."""
    made: list[Client] = []
    yield made
    for client in made:
        client.close()


@pytest.fixture
def asker(clients: list[Client]) -> Callable[..., Asker]:
    def make(stub: Stub, kind: str | None = None, **more: object) -> Asker:
        route = Route.of(stub.url, kind)
        clients.append(Client(route.address))
        return Asker(clients[-1], route, "stub", **more)  # type: ignore[arg-type]

    return make


async def test_an_answer_is_counted_by_the_servers_usage(stub: Stub, asker: Ask) -> None:
    outcome = await asker(stub).ask([1, 2], 3)
    assert (outcome.error, outcome.input_tokens, outcome.output_tokens) == ("", 7, 3)
    assert outcome.by_usage
    assert len(outcome.times) == 3
    assert outcome.sent <= outcome.times[0] <= outcome.times[-1] <= outcome.ended
    [body] = stub.bodies
    assert body["prompt"] == [1, 2]
    assert body["max_tokens"] == 3
    assert body["temperature"] == 0
    assert body["ignore_eos"] is True
    assert body["stream_options"] == {"include_usage": True}


async def test_without_usage_pieces_of_text_are_counted(stub: Stub, asker: Ask) -> None:
    stub.answers("a", "", "b")
    outcome = await asker(stub, ignore_eos=False).ask([1, 2, 3], 9)
    assert (outcome.input_tokens, outcome.output_tokens, outcome.by_usage) == (3, 2, False)
    assert "ignore_eos" not in stub.bodies[0]


async def test_usage_in_the_last_piece_of_an_answer_and_what_was_cached(asker: Ask) -> None:
    async with Llama() as llama:
        llama.cached = 31
        outcome = await asker(llama).ask(list(range(32)), 3)
    assert (outcome.error, outcome.by_usage, outcome.short) == ("", True, False)
    assert (outcome.input_tokens, outcome.cached_tokens, outcome.output_tokens) == (32, 31, 3)
    assert len(outcome.times) == 3
    found = load.summary(Run([outcome], ended=1), {})
    assert (found["total_cached_tokens"], found["short_answers"]) == (31, 0)


async def test_an_answer_without_room_is_short(asker: Ask) -> None:
    async with Llama(context=40) as llama:
        outcome = await asker(llama).ask(list(range(32)), 16)
    assert (outcome.error, outcome.output_tokens, outcome.short) == ("", 8, True)
    assert load.summary(Run([outcome], ended=1), {})["short_answers"] == 1


async def test_tokens_without_text_are_an_answer(stub: Stub, asker: Ask) -> None:
    """Of special tokens, or of half a character."""
    stub.answers(usage=1)
    outcome = await asker(stub).ask([1], 1)
    assert (outcome.error, outcome.output_tokens, outcome.itl) == ("", 1, [])
    assert outcome.sent < outcome.times[0] <= outcome.ended
    stub.answers()  # and nothing says that there were any
    assert (await asker(stub).ask([1], 1)).error == "the answer holds no text"


async def test_the_request_before_warms_no_prompt(stub: Stub, asker: Ask) -> None:
    await load.check(asker(stub), [1, 2, 3])
    await load.check(asker(stub), "once upon a")
    assert [body["prompt"] for body in stub.bodies] == [[3, 2, 1], "a upon once"]
    assert load.turned("  ") == "  "


async def test_pieces_of_several_tokens_cut_anywhere(stub: Stub, asker: Ask) -> None:
    """Chunks end in the middle of events, and hold several of them."""
    stub.answers("several tokens", " at once", usage=12)
    whole = b""
    for step in stub.script:
        data = (
            step if isinstance(step, bytes) else b"data: " + json.dumps(step).encode() + b"\r\n\r\n"
        )
        whole += data
    stub.script = [b": a comment\n\n", *(whole[i : i + 7] for i in range(0, len(whole), 7))]
    outcome = await asker(stub).ask([1], 12)
    assert (outcome.error, outcome.output_tokens, len(outcome.times)) == ("", 12, 2)
    assert outcome.tpot == (outcome.ended - outcome.times[0]) / 11
    assert outcome.itl == [outcome.times[1] - outcome.times[0]]


async def test_a_chat_begins_with_its_first_word_not_with_its_role(stub: Stub, asker: Ask) -> None:
    stub.answers("", "hello", usage=2, chat=True)
    stub.script.insert(0, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    outcome = await asker(stub, "chat").ask("hi", 2)
    assert (outcome.error, len(outcome.times)) == ("", 1)
    assert stub.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]
    assert stub.requests[0][1] == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ([event("a"), "drop"], "closed before the end"),
        ([event("a")], "ended in the middle"),
        ([event("a"), {"error": {"message": "out of luck"}}], "out of luck"),
        ([b"data: {nonsense\n\n"], "Expecting"),
        ([b"data: []\n\n"], "no JSON object"),
        ([b'data: {"choices": 5}\n\n'], "not the form"),
        ([b'data: {"choices": [7]}\n\n'], "not the form"),
        ([b"data: [DONE]\n\n"], "holds no text"),
        ([], "ended in the middle"),
    ],
)
async def test_a_bad_stream_is_a_failed_request(
    stub: Stub, script: list, said: str, asker: Ask
) -> None:
    stub.script = script
    outcome = await asker(stub).ask([1], 2)
    assert said in outcome.error
    assert outcome.reached
    assert outcome.ended >= outcome.sent


async def test_other_answers_are_failures(stub: Stub, asker: Ask) -> None:
    stub.status, stub.reply = 429, b'{"error": {"message": "too\\nmany"}}'
    assert (await asker(stub).ask([1], 2)).error == "HTTP 429: too many"
    stub.reply = b"<html>busy</html>"
    assert (await asker(stub).ask([1], 2)).error == "HTTP 429: <html>busy</html>"
    stub.status, stub.type = 200, "application/json"
    assert "no stream" in (await asker(stub).ask([1], 2)).error


async def test_a_request_that_never_ends(stub: Stub, asker: Ask) -> None:
    never = asyncio.Event()

    async def wait(*_: object) -> bool:
        await never.wait()
        return False

    stub._answer = wait  # type: ignore[method-assign]
    outcome = await asker(stub, timeout=0.05).ask([1], 2)
    assert outcome.error == "no end after 0.05 s"
    never.set()


async def test_connections_are_kept_and_replaced_when_they_have_ended(
    stub: Stub, asker: Ask
) -> None:
    one = asker(stub)
    for _ in range(3):
        assert not (await one.ask([1], 3)).error
    assert stub.connections == 1
    stub.drop_before_answer = 1  # as a server does that gives up an idle connection
    assert not (await one.ask([1], 3)).error
    assert stub.connections == 2
    stub.keep = False
    assert not (await one.ask([1], 3)).error
    assert not (await one.ask([1], 3)).error
    stub.drop_before_answer = 10  # a connection that is new is not tried again
    before = stub.connections
    assert "closed" in (await asker(stub).ask([1], 3)).error
    assert stub.connections == before + 1
    one.client.close()


async def test_a_closed_loop_keeps_so_many_running(stub: Stub, asker: Ask) -> None:
    run, seen = Run(), []
    await load.closed(asker(stub), WORK, 3, run, seen.append)
    assert len(run.outcomes) == len(seen) == 6
    assert run.most_running == 3
    assert stub.connections == 3
    assert sorted(b["prompt"] for b in stub.bodies) == sorted(WORK.prompts)
    await load.closed(asker(stub), WORK, 1, again := Run(), seen.append)
    assert again.most_running == 1


async def test_an_open_loop_asks_at_times_of_its_own(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, asker: Ask
) -> None:
    clock, waits, sleep = [0.0], [], asyncio.sleep

    async def pass_time(seconds: float) -> None:
        waits.append(seconds)
        clock[0] += seconds
        await sleep(0)

    monkeypatch.setattr(load.asyncio, "sleep", pass_time)
    monkeypatch.setattr(load.time, "perf_counter", lambda: clock[0])
    for _ in range(2):
        await load.opened(asker(stub), WORK, 4.0, 7, Run(), lambda outcome: None)
    draw = random.Random(7)
    expected = [0.0, *(draw.expovariate(4.0) for _ in range(5))]
    assert waits == pytest.approx(expected * 2)
    assert [b["prompt"] for b in stub.bodies].count(WORK.prompts[0]) == 2


async def test_broken_off_what_has_come_is_kept(stub: Stub, asker: Ask) -> None:
    run = Run()

    def stop(outcome: Outcome) -> None:
        if len(run.outcomes) == 2:
            task.cancel()

    task = asyncio.ensure_future(load.closed(asker(stub), WORK, 1, run, stop))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(run.outcomes) == 2
    assert load.summary(run, {})["completed"] == 2


def outcome(sent: float, *times: float, ended: float, tokens: int, error: str = "") -> Outcome:
    return Outcome(
        input_tokens=10, output_tokens=tokens, by_usage=True, sent=sent, times=list(times),
        ended=ended, error=error,
    )  # fmt: skip


def test_the_summary() -> None:
    run = Run(begun=1.0, ended=5.0, most_running=2)
    run.outcomes = [
        outcome(1.0, 1.1, 1.3, ended=1.5, tokens=5),
        outcome(1.0, 1.3, 2.3, ended=2.3, tokens=3),
        outcome(2.0, 2.5, ended=2.5, tokens=1),
        outcome(2.0, ended=2.5, tokens=0, error="gone"),
    ]
    found = load.summary(run, {"ttft": 0.35, "tpot": 0.2})
    assert (found["completed"], found["failed"], found["errors"]) == (3, 1, {"gone": 1})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 9)
    assert found["duration"] == 4
    assert found["request_throughput"] == 0.75
    assert found["output_throughput"] == 2.25
    assert found["total_token_throughput"] == 9.75
    assert found["mean_ttft_ms"] == pytest.approx(300)
    assert found["median_ttft_ms"] == pytest.approx(300)
    assert found["max_ttft_ms"] == pytest.approx(500)
    # One token has no time between tokens.
    assert found["mean_tpot_ms"] == pytest.approx((100 + 500) / 2)
    assert found["mean_itl_ms"] == pytest.approx((200 + 1000) / 2)
    assert found["mean_e2el_ms"] == pytest.approx((500 + 1300 + 500) / 3)
    assert found["mean_concurrency"] == pytest.approx(2.3 / 4)
    assert (found["good_requests"], found["request_goodput"]) == (1, 0.25)
    assert found["tokens_by"] == "usage"
    empty = load.summary(Run(), {})
    assert empty["completed"] == 0
    assert math.isnan(empty["mean_ttft_ms"])
    assert "request_goodput" not in empty


def test_bounds_of_a_good_request() -> None:
    assert load.parse_slo("ttft=200, tpot = 50ms,e2e=1.5s") == {
        "ttft": 0.2, "tpot": 0.05, "e2el": 1.5,
    }  # fmt: skip
    assert load.parse_slo("") == {}
    for text in ("ttft", "ttft=", "ttft=0", "ttft=-1", "speed=3", "ttft=1.2.3", "ttft=3min"):
        with pytest.raises(InvalidRequest, match="is no bound"):
            load.parse_slo(text)


def test_prompts_as_words() -> None:
    text = load.as_text(WORK, 1)
    assert [len(str(p).split()) for p in text.prompts] == [4] * 6
    assert len(set(text.prompts)) == 6  # type: ignore[arg-type]
    assert load.as_text(WORK, 1) == text
    assert text.output_tokens == WORK.output_tokens


@pytest.mark.parametrize(
    ("url", "kind", "path"),
    [
        ("http://h:1", None, "/v1/completions"),
        ("h:1/", None, "/v1/completions"),
        ("http://h:1/v1", "chat", "/v1/chat/completions"),
        ("https://h/x/v1/", None, "/x/v1/completions"),
        ("http://h/v1/chat/completions", None, "/v1/chat/completions"),
        ("http://[::1]:8/v1/completions", "completions", "/v1/completions"),
    ],
)
def test_routes(url: str, kind: str | None, path: str) -> None:
    route = Route.of(url, kind)
    assert route.path == path
    assert route.chat == ("chat" in path)
    assert route.models_path == path[: path.index("v1")] + "v1/models"


def test_addresses() -> None:
    assert Address.of("https://h") == Address(True, "h", 443, "")
    assert str(Address.of("http://[::1]:8")) == "http://[::1]:8"
    bad = ("", "ftp://h", "http://", "http://h:x", "http://u:p@h", "http://h/?a", "http://h/\r\nX")
    for url in bad:
        with pytest.raises(InvalidRequest):
            Address.of(url)
    for url, kind in (("http://h/v1/completions", "chat"), ("http://h", "embeddings")):
        with pytest.raises(InvalidRequest):
            Route.of(url, kind)
    with pytest.raises(InvalidRequest):
        Client(Address.of("h"), api_key="a\r\nb")


async def test_the_first_model_and_the_key(stub: Stub) -> None:
    route = Route.of(stub.url)
    client = Client(route.address, api_key="secret")
    assert await first_model(client, route) == "stub"
    assert stub.requests[0][2]["authorization"] == "Bearer secret"
    stub.models = []
    with pytest.raises(NotFound, match="lists no model"):
        await first_model(client, route)
    client.close()


async def test_servers_that_are_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    route = Route.of(url)
    client = Client(route.address)
    with pytest.raises(Unreachable, match="no answer from"):
        await first_model(client, route)
    with pytest.raises(Unreachable, match="no answer from"):
        await load.check(Asker(client, route, "m"), [1])


async def test_servers_that_speak_something_else() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail ready\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        route = Route.of(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(Unreachable, match="does not speak HTTP"):
            await load.check(Asker(Client(route.address), route, "m"), [1])


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (404, NotFound, "is not there"),
        (401, InvalidRequest, "wants a key"),
        (422, InvalidRequest, "refuses the request"),
        (500, KvrunError, "has not answered"),
        (503, KvrunError, "is not ready"),
    ],
)
async def test_a_first_request_that_fails(
    stub: Stub, status: int, kind: type[KvrunError], said: str, asker: Ask
) -> None:
    stub.status, stub.reply = status, b'{"message": "because"}'
    with pytest.raises(kind, match=said) as raised:
        await load.check(asker(stub), [1])
    assert raised.value.cause == f"HTTP {status}: because"
    assert type(raised.value) is kind


async def test_a_prompt_longer_than_the_context(asker: Ask) -> None:
    async with Llama() as llama:
        with pytest.raises(InvalidRequest, match="has no room") as raised:
            await load.check(asker(llama), [1] * 64)
    assert "64 tokens) exceeds the available context size (64" in raised.value.cause
    assert "--text" not in raised.value.hint


def test_failures_of_a_kind_each() -> None:
    assert failures({}) == []
    errors = {f"request ({n} tokens) is too long": 1 for n in range(9)}
    lines = failures({"gone": 5} | errors)
    assert lines[0] == "failed 5 times: gone"
    assert lines[3:] == ["failed 7 times in other ways"]
