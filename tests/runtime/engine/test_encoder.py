"""Models with an encoder through the whole engine: sharing, preemption, faults, refusals."""

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from kvrun import LLM, SamplingParams
from kvrun.errors import InvalidRequest
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine
from kvrun.runtime.engine.request import Request
from kvrun.runtime.engine.start import start
from kvrun.runtime.layers.encoder import EncoderDecoder
from tests.runtime.models import seq2seq
from tests.runtime.models.compare import prompt

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
PROMPTS = [prompt(20 + i, length) for i, length in enumerate((12, 30, 5, 21))]
BLOCK = 4 * 2 * 2 * 4 * 8 * 4  # bytes: four tokens, two layers, keys and values, heads, fp32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("t5")
    oracle = seq2seq.make(folder, "t5", "flan")
    return folder, oracle


@pytest.fixture(scope="module")
def answers(model: tuple[Path, Any]) -> list[list[int]]:
    return [seq2seq.greedy(model[1], ids, 24) for ids in PROMPTS]


def blocks(engine: Engine) -> Iterator[int]:
    """How often each block that is not free is named by a sequence."""
    scheduler = engine.scheduler
    for sequence in [*scheduler.running, *scheduler.leaving, *scheduler.waiting]:
        yield from sequence.all_blocks


WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "small steps": {"max_num_batched_tokens": 8, "block_size": 4},
    # Beside the padding seventeen blocks of four tokens: all four do not fit.
    "preempted": {"kv_memory": 18 * BLOCK, "max_model_len": 60, "block_size": 4},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_greedy_answers_are_those_of_transformers(
    model: tuple[Path, Any], answers: list[list[int]], options: dict[str, Any]
) -> None:
    with LLM(str(model[0]), max_num_seqs=4, **options) as llm:
        found = llm.generate(PROMPTS, GREEDY)
        stats = llm.stats()
    assert [output.token_ids for output in found] == answers
    assert [output.prompt_token_ids for output in found] == PROMPTS
    assert (stats.preemptions > 0) == ("kv_memory" in options)
    if "kv_memory" not in options:
        assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.blocks_active == 0


@pytest.mark.parametrize("ahead", [0, 3])
def test_steps_ahead_and_a_step_that_fails(
    model: tuple[Path, Any],
    answers: list[list[int]],
    ahead: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode, memory = EncoderDecoder.encode, [False]

    def failing(self: EncoderDecoder, batch: Any) -> None:
        if len(batch.query_lens_host) > 2 and not memory[0]:
            memory[0] = True
            raise MemoryError("no room for three")
        if 127 in batch.ids:
            raise ValueError("this prompt breaks it")
        encode(self, batch)

    monkeypatch.setattr(EncoderDecoder, "encode", failing)
    engine = start(EngineConfig(model=str(model[0]), run_ahead=ahead, threads=1, max_num_seqs=8))
    good = [[token % 127 for token in ids] for ids in PROMPTS]
    asked = [*good[:2], [5, 127, 6], *good[2:]]
    for number, ids in enumerate(asked):
        engine.add(Request(id=f"r{number}", prompt_ids=ids, params=GREEDY))
    deltas = []
    for _ in range(200):
        deltas += engine.step()
        named = set(blocks(engine))
        pool = engine.scheduler.pool
        assert len(named) + pool.free == pool.total
    reasons = {d.request_id: (d.finish_reason, d.error) for d in deltas if d.finish_reason}
    assert memory[0]
    assert reasons.pop("r2") == ("error", "ValueError: this prompt breaks it")
    assert set(reasons.values()) == {("length", None)}
    tokens: dict[str, list[int]] = {}
    for delta in deltas:
        tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    for number in (0, 1, 3, 4):
        assert tokens[f"r{number}"] == seq2seq.greedy(model[1], asked[number], 24)


def test_choices_share_what_the_encoder_has_read(model: tuple[Path, Any]) -> None:
    engine = start(EngineConfig(model=str(model[0]), threads=1, block_size=4))
    params = SamplingParams(n=3, max_tokens=8, seed=1, temperature=1.0, ignore_eos=True)
    engine.add(Request(id="r", prompt_ids=PROMPTS[1], params=params))
    most, deltas = 0, []
    choices: dict[int, list[int]] = {}
    while not engine.idle:
        deltas += engine.step()
        most = max(most, len(set(blocks(engine))))
    assert engine.stats().prompt_tokens == 30 + 2  # and the first token of two answers
    assert most == -(-30 // 4) + 3 * -(-8 // 4)
    for delta in deltas:
        choices.setdefault(delta.index, []).extend(delta.token_ids)
    assert sorted(choices) == [0, 1, 2]
    assert len({tuple(tokens) for tokens in choices.values()}) == 3


def test_a_prompt_that_was_read_is_hit_until_its_blocks_are_needed(
    model: tuple[Path, Any], answers: list[list[int]]
) -> None:
    # Eighteen blocks beside the padding; a prompt of 30 with its answer takes fourteen.
    sizes: Any = {"kv_memory": 19 * BLOCK, "block_size": 4, "max_model_len": 60}
    with LLM(str(model[0]), max_num_seqs=1, **sizes) as llm:
        first = llm.generate(PROMPTS[1], GREEDY)
        again = llm.generate(PROMPTS[1], GREEDY)
        assert llm.stats().prefix_hit_tokens == 30
        assert llm.stats().prompt_tokens == 30 + 1
        other = llm.generate([PROMPTS[3], PROMPTS[0]], GREEDY)
        llm.generate(PROMPTS[1], GREEDY)
        assert llm.stats().prefix_hit_tokens == 30  # gone
    assert first[0].token_ids == again[0].token_ids == answers[1]
    assert [o.token_ids for o in other] == [answers[3], answers[0]]


def test_adapters_change_the_encoder_too(model: tuple[Path, Any], tmp_path: Path) -> None:
    folder, oracle = model
    plain = seq2seq.greedy(oracle, PROMPTS[1], 24)
    torch.manual_seed(3)
    base = type(oracle).from_pretrained(folder, dtype=torch.float32)
    targets = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=8, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2)
    adapted.save_pretrained(tmp_path)
    wanted = seq2seq.greedy(adapted.base_model.model, PROMPTS[1], 24)
    with LLM(str(folder), adapters={"a": str(tmp_path)}) as llm:
        both = [PROMPTS[1]] * 2
        assert [o.token_ids for o in llm.generate(both, GREEDY, ["a", None])] == [wanted, plain]
        # Neither takes what the encoder has read for the other.
        assert [o.token_ids for o in llm.generate(both, GREEDY, [None, "a"])] == [plain, wanted]
        assert llm.stats().prefix_hit_tokens == 60
    assert wanted != plain


@pytest.mark.parametrize("request_of", [{"prompt_logprobs": 1}, {"pooling": True}])
def test_what_an_encoder_cannot_tell_is_refused(
    model: tuple[Path, Any], request_of: dict[str, Any]
) -> None:
    engine = start(EngineConfig(model=str(model[0]), threads=1))
    pooling = request_of.pop("pooling", False)
    params = SamplingParams(**request_of)
    with pytest.raises(InvalidRequest, match="no log-probabilities and no embedding"):
        engine.add(Request(id="r", prompt_ids=[3], params=params, pooling=pooling))
    assert engine.idle


def test_prompt_and_answer_share_the_context(model: tuple[Path, Any]) -> None:
    whole = SamplingParams(max_tokens=41, temperature=0, ignore_eos=True)
    with LLM(str(model[0]), max_model_len=62, max_num_seqs=1, block_size=4) as llm:
        assert llm.max_model_len == 62
        assert len(llm.generate(PROMPTS[3], whole)[0].token_ids) == 41
        unbound = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
        assert len(llm.generate(PROMPTS[3], unbound)[0].token_ids) == 41
        with pytest.raises(InvalidRequest, match="the context holds 62"):
            llm.generate([*PROMPTS[3], 1], whole)


def test_penalties_know_the_answer_only(model: tuple[Path, Any]) -> None:
    """Tokens of the prompt are no repetition: it is the encoder's."""
    folder, oracle = model
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, repetition_penalty=1.3)
    with LLM(str(folder)) as llm:
        found = llm.generate(PROMPTS[1], params)[0].token_ids
    with torch.inference_mode():
        wanted = oracle.generate(
            torch.tensor([PROMPTS[1]]), max_new_tokens=24, min_new_tokens=24, eos_token_id=None,
            do_sample=False, use_cache=False, repetition_penalty=1.3,
        )[0, 1:].tolist()  # fmt: skip
    assert found == wanted


def test_without_prefix_caching_only_choices_share(model: tuple[Path, Any]) -> None:
    with LLM(str(model[0]), prefix_caching=False) as llm:
        two = SamplingParams(n=2, max_tokens=4, temperature=0, ignore_eos=True)
        llm.generate(PROMPTS[1], two)
        assert llm.stats().prefix_hit_tokens == 30
        llm.generate(PROMPTS[1], GREEDY)
        assert llm.stats().prefix_hit_tokens == 30


def test_texts_are_encoded_as_the_tokenizer_ends_them(
    model: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, oracle = Path(shutil.copytree(model[0], tmp_path / "model")), model[1]
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 128)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with LLM(str(folder)) as llm:
        output = llm.generate("w7 w9 w7", GREEDY)[0]
        assert output.prompt_token_ids == [7, 9, 7, 1]
        assert output.token_ids == seq2seq.greedy(oracle, [7, 9, 7, 1], 24)
        assert output.text.split() == [f"w{token}" for token in output.token_ids if token > 1]
        with pytest.raises(InvalidRequest, match="no chat template"):
            llm.chat([{"role": "user", "content": "w7"}], GREEDY)


def test_what_is_not_finite_is_neither_shared_nor_left_behind(
    model: tuple[Path, Any], answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, bad = EncoderDecoder.encode, list(range(5, 25))

    def spoiling(self: EncoderDecoder, batch: Any) -> None:
        encode(self, batch)
        if batch.ids.tolist() == bad:
            batch.backend.cache.rows(1)[batch.slot_mapping] = float("nan")

    sizes: Any = {"kv_memory": 30 * BLOCK, "block_size": 4, "max_model_len": 60}
    with LLM(str(model[0]), max_num_seqs=2, **sizes) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(EncoderDecoder, "encode", spoiling)
            assert "not finite" in (llm.generate(bad, GREEDY)[0].error or "")
        # The shorter prompt leaves a part of a block as it was.
        both = llm.generate([PROMPTS[2], PROMPTS[1]], GREEDY)
        assert [output.token_ids for output in both] == [answers[2], answers[1]]
        assert llm.generate(bad, GREEDY)[0].token_ids == seq2seq.greedy(model[1], bad, 24)
        assert llm.stats().prefix_hit_tokens == 0
