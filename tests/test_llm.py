"""LLM on the built-in model: text in, text out."""

from collections.abc import Iterator

import pytest

from kvrun import LLM, SamplingParams
from kvrun.errors import InvalidRequest, KvrunError, NotFound
from kvrun.runtime.engine.runner import ModelRunner
from kvrun.runtime.engine.scheduler import Schedule
from kvrun.runtime.engine.ticket import Ticket
from kvrun.runtime.text import TextStream

GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", dtype="float32") as llm:
        yield llm


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat_answers(llm: LLM) -> None:
    (output,) = llm.chat(ask("What is 12 + 30?"), GREEDY)
    assert "42" in output.text
    assert output.finish_reason == "stop"
    assert output.prompt_token_ids


def test_a_list_in_a_list_out(llm: LLM) -> None:
    questions = ["What is 3 + 4?", "What is the capital of France?"]
    together = llm.chat([ask(q) for q in questions], GREEDY)
    assert [o.text for o in together] == [llm.chat(ask(q), GREEDY)[0].text for q in questions]
    assert "7" in together[0].text
    assert "Paris" in together[1].text
    by_ids = llm.generate([o.prompt_token_ids for o in together], [GREEDY, GREEDY])
    assert [o.token_ids for o in by_ids] == [o.token_ids for o in together]
    assert llm.generate(together[0].prompt_token_ids, GREEDY)[0].token_ids == together[0].token_ids


def test_no_prompts_have_no_answers(llm: LLM) -> None:
    assert llm.generate([]) == []
    assert llm.generate([], adapter=[], images=[]) == []


def test_stream_is_the_answer_in_pieces(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", GREEDY)[0]
    deltas = list(llm.stream("Once upon a time", GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == whole.token_ids
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == whole.finish_reason
    assert len(deltas) > 5


def test_a_stream_that_is_left_leaves_nothing_behind(llm: LLM) -> None:
    stream = llm.stream("Once upon a time", SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.stats().running == 0
    assert llm.stats().blocks_active == 0


def test_an_interrupted_call_leaves_nothing_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = llm.stats()
    steps = iter(range(10))

    def submit(self: ModelRunner, schedule: Schedule) -> Ticket:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return healthy(self, schedule)

    healthy = ModelRunner.submit
    monkeypatch.setattr(ModelRunner, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Once upon a time", "12 + 30 ="], GREEDY)
    monkeypatch.undo()
    after = llm.stats()
    assert (after.running, after.waiting, after.blocks_active) == (0, 0, 0)
    assert after.steps > before.steps, "stats are a snapshot"
    with pytest.raises(TypeError):
        llm.generate([[1, 2], ["x"]], GREEDY)  # type: ignore[list-item]
    assert llm.stats().waiting == 0


def test_a_closed_llm_says_so() -> None:
    with LLM("tiny", dtype="float32", kv_memory=10_000_000) as llm:
        stream = llm.stream("Once upon a time", GREEDY)
        next(stream)
    stream.close()
    with pytest.raises(KvrunError, match="closed"):
        llm.generate("x")


def test_stop_strings_cut_text_and_tokens(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", GREEDY)[0]
    stop = whole.text[12:17]
    cut = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=40, stop=stop))[
        0
    ]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    assert len(cut.token_ids) < len(whole.token_ids)


def test_choices(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.5, seed=1, max_tokens=20)
    (output,) = llm.generate("Once upon a time", params)
    texts = [choice.text for choice in output.choices]
    assert len(set(texts)) == 3
    assert output.text == texts[0]
    single = SamplingParams(temperature=1.5, seed=1, max_tokens=20)
    assert llm.generate("Once upon a time", single)[0].text == texts[0]
    assert texts == [c.text for c in llm.generate("Once upon a time", params)[0].choices]


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2)
    output = llm.generate("Once upon a time", params)[0]
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in output.logprobs)


def test_E8_a_text_that_cannot_be_decoded_ends_one_request(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Once upon a time", "12 + 30 ="]
    story, total = llm.generate(texts, GREEDY)
    poison = next(token for token in story.token_ids if token not in total.token_ids)
    healthy = TextStream.push

    def push(self: TextStream, ids: list[int]) -> str:
        if poison in ids:
            raise ValueError("no such text")
        return healthy(self, ids)

    monkeypatch.setattr(TextStream, "push", push)
    broken, other = llm.generate(texts, GREEDY)
    assert broken.finish_reason == "error"
    assert "no such text" in (broken.error or "")
    assert other == total
    assert llm.stats().running == 0


def test_refusals_compute_nothing(llm: LLM) -> None:
    before = llm.stats().steps
    with pytest.raises(InvalidRequest, match="context"):
        llm.generate([[1, 2], [1] * 4000], GREEDY)
    with pytest.raises(InvalidRequest, match="empty"):
        llm.generate([[]], GREEDY)
    with pytest.raises(InvalidRequest, match="2 prompts"):
        llm.generate([[1], [2]], [GREEDY])
    assert llm.stats().running == 0
    assert llm.stats().steps <= before + 1
    with pytest.raises(NotFound, match="tinny"):
        LLM("tinny")
