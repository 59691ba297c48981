"""One model ready to answer: what fits, what is counted, what happens when something breaks."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from kvrun.chat.session import Reply, Session, describe
from kvrun.errors import EngineDead, InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.text import Text

GREEDY = SamplingParams(temperature=0)


def user(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


async def read(reply: Reply) -> list[str]:
    return [piece async for _, piece in reply]


async def ask(session: Session, text: str, **params: object) -> Reply:
    reply = await session.ask(user(text), replace(GREEDY, **params))  # type: ignore[arg-type]
    await read(reply)
    return reply


async def test_an_answer_streams_and_is_counted(session: Session) -> None:
    reply = await session.ask(user("say naïve 雪 ☃"), GREEDY)
    pieces = await read(reply)
    assert "".join(pieces) == reply.text == "naïve 雪 ☃"
    assert len(pieces) == len("naïve 雪 ☃")  # a piece per character, never half of one
    assert reply.finish_reason == "stop"
    assert reply.tokens == len("naïve 雪 ☃".encode()) + 1  # a token per byte, and the last
    assert reply.prompt_tokens == len("say naïve 雪 ☃".encode()) + 3  # and the template's
    assert reply.cached_tokens == 4
    timing = reply.timing
    assert timing.first_token is not None
    assert 0 <= timing.first_token <= timing.total
    assert timing.rate is not None
    assert describe(reply)["completion_tokens"] == reply.tokens


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [("cd", "ab", 4), ("zz", "abcdef", 7), ("a", "", 1), ("f", "abcde", 6)],
)
async def test_a_stop_string_ends_the_answer_and_the_engines_work(
    session: Session, scripted: ModuleType, stop: str, text: str, tokens: int
) -> None:
    reply = await ask(session, "say abcdef", stop=(stop,))
    assert (reply.text, reply.tokens, reply.finish_reason) == (text, tokens, "stop")
    engine = scripted.ScriptedEngine.started[-1]
    assert (engine.ended_early == [reply.request.id]) is (stop in "abcdef")


async def test_tokens_after_a_stop_string_in_the_same_step_do_not_count(session: Session) -> None:
    reply = await ask(session, "burst abcdef", stop=("cd",))
    assert (reply.text, reply.tokens, reply.finish_reason) == ("ab", 4, "stop")


async def test_max_tokens_cuts_and_defaults_to_what_fits(session: Session) -> None:
    reply = await ask(session, "say abcdef", max_tokens=3)
    assert (reply.text, reply.finish_reason, reply.tokens) == ("abc", "length", 3)
    reply = await session.ask(user("say x"), GREEDY)
    assert reply.request.params.max_tokens == session.context - reply.prompt_tokens


async def test_text_held_back_for_a_stop_string_comes_at_the_end(session: Session) -> None:
    reply = await ask(session, "say abc", stop=("cde",))
    assert (reply.text, reply.finish_reason) == ("abc", "stop")
    reply = await ask(session, "say abcd", stop=("cde",), max_tokens=3)
    assert (reply.text, reply.finish_reason) == ("abc", "length")


async def test_several_choices(session: Session) -> None:
    reply = await ask(session, "say ab", n=3, logprobs=1)
    assert [choice.text for choice in reply.choices] == ["ab"] * 3
    assert reply.tokens == 9
    assert [len(choice.logprobs) for choice in reply.choices] == [2, 2, 2]


async def test_the_oldest_turns_give_way_and_are_counted(scripted: ModuleType, model: Path) -> None:
    config = EngineConfig(model=str(model), max_model_len=120)
    engine = scripted.ScriptedEngine
    async with Session("toy", config, open_text=Text.open, connect=engine) as session:
        await session.ready()
        turns = user("q1 " + "x" * 40, "a1 " + "x" * 40, "q2", "a2", "q3")
        messages = [{"role": "system", "content": "sys"}, *turns]
        reply = await session.ask(messages, GREEDY)
        assert reply.dropped == 1
        prompt = session.text.decode(reply.request.prompt_ids, skip_special=False)
        assert prompt == (
            "<|system|>sys<|end|><|user|>q2<|end|><|assistant|>a2<|end|><|user|>q3<|end|>"
            "<|assistant|>"
        )
        assert (await session.ask(messages[3:], GREEDY)).dropped == 0
        # room for the answer is part of what has to fit
        tight = user("q" * 30, "a" * 30, "q" * 30)
        assert (await session.ask(tight, replace(GREEDY, max_tokens=5))).dropped == 0
        assert (await session.ask(tight, replace(GREEDY, max_tokens=29))).dropped == 1


async def test_a_question_that_cannot_fit_names_both_numbers(
    scripted: ModuleType, model: Path
) -> None:
    config = EngineConfig(model=str(model), max_model_len=64)
    engine = scripted.ScriptedEngine
    async with Session("toy", config, open_text=Text.open, connect=engine) as session:
        await session.ready()
        with pytest.raises(InvalidRequest, match="103 tokens; 64 fit") as error:
            await session.ask(user("x" * 100), GREEDY)
        assert "context is 64" in error.value.cause
        with pytest.raises(InvalidRequest, match="2,000 characters"):
            await session.ask(user("x" * 2000), GREEDY)
        with pytest.raises(InvalidRequest, match="empty"):
            await session.ask(user(" \n"), GREEDY)
        assert (await ask(session, "say yes")).text == "yes"  # and the session goes on
        assert not scripted.ScriptedEngine.started[-1].ended_early


async def test_leaving_early_keeps_what_came(session: Session, scripted: ModuleType) -> None:
    reply = await session.ask(user("hang"), GREEDY)
    pieces = reply.__aiter__()
    assert [(await anext(pieces))[1] for _ in range(3)] == ["L", "e", "t"]
    await pieces.aclose()
    assert (reply.text, reply.finish_reason) == ("Let", "abort")
    assert scripted.ScriptedEngine.started[-1].ended_early == [reply.request.id]


async def test_a_failed_request_is_an_error_and_the_next_one_works(session: Session) -> None:
    with pytest.raises(KvrunError, match="could not finish") as error:
        await ask(session, "break")
    assert error.value.cause == "NaN in the logits"
    assert (await ask(session, "say on")).text == "on"


async def test_a_dead_engine_is_an_error_and_is_started_again(
    session: Session, scripted: ModuleType
) -> None:
    first = scripted.ScriptedEngine.started[-1]
    with pytest.raises(EngineDead, match="has ended"):
        await ask(session, "die")
    assert (await ask(session, "say back")).text == "back"
    second = scripted.ScriptedEngine.started[-1]
    assert second is not first
    assert first.closed
    assert not second.closed


async def test_a_model_without_template_continues_text(
    scripted: ModuleType, tmp_path: Path
) -> None:
    config = EngineConfig(model=str(scripted.make_model(tmp_path, template=False)))
    engine = scripted.ScriptedEngine
    async with Session("base", config, open_text=Text.open, connect=engine) as session:
        await session.ready()
        reply = await session.ask(user("Once", " upon", "a time"), GREEDY)
        assert session.text.decode(reply.request.prompt_ids) == "Once\n upon\na time"
        with pytest.raises(InvalidRequest, match="no system prompt"):
            await session.ask([{"role": "system", "content": "s"}, *user("x")], GREEDY)


async def test_what_keeps_a_session_from_starting(
    scripted: ModuleType, model: Path, tmp_path: Path
) -> None:
    engine = scripted.ScriptedEngine
    config = EngineConfig(model=str(model), dtype="float16")
    with pytest.raises(Unsupported, match="float16"):
        async with Session("toy", config, open_text=Text.open, connect=engine) as session:
            await session.ready()
    assert engine.started[-1].closed
    config = EngineConfig(model=str(model))
    with pytest.raises(Unsupported, match="no tokenizer"):
        async with Session("toy", config, open_text=lambda _: None, connect=engine) as session:
            await session.ready()
    assert engine.started[-1].closed
