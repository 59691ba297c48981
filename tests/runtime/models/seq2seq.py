"""Small random models with an encoder, and a driver that has it read prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from kvrun.runtime.batch import Batch
from kvrun.runtime.engine.reader import Reader
from kvrun.runtime.engine.request import Request
from kvrun.runtime.engine.scheduler import Row
from kvrun.runtime.engine.sequence import Sequence as Running
from kvrun.runtime.engine.slots import Slots
from kvrun.runtime.layers.encoder import EncoderDecoder
from kvrun.runtime.sampling.params import SamplingParams
from tests.runtime.driver import Driver
from tests.runtime.models.compare import prompt, worst

SMALL = {
    "vocab_size": 128,
    "d_model": 64,
    "d_kv": 8,  # times heads is not d_model
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,  # shorter than the prompts
    "decoder_start_token_id": 0,
}
VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    ("t5", "v1.0"): {"feed_forward_proj": "relu"},
    ("t5", "flan"): {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ("t5", "deeper decoder"): {"feed_forward_proj": "relu", "num_decoder_layers": 3},
    ("mt5", "plain"): {"tie_word_embeddings": False},
    ("umt5", "plain"): {},
}
LONG, SHORT = 37, 5  # tokens of prompts
FIRST = 7  # of the decoder's tokens in the first step


def make(folder: Path, family: str, variant: str) -> Any:
    """Write a random checkpoint to `folder`; the same model in transformers, in fp32."""
    torch.manual_seed(len(family) * 31 + len(variant))
    values = VARIANTS[family, variant]
    config = AutoConfig.for_model(family, **{**SMALL, **values})
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    if values.get("tie_word_embeddings") is False:
        # transformers ties what is not in the file; files of v1.1 and mT5 have a head of their own.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += torch.randn_like(parameter) * 0.1
            else:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


@torch.inference_mode()
def greedy(oracle: Any, ids: list[int], count: int) -> list[int]:
    """What transformers answers. Its cache takes the decoder for as deep as the encoder."""
    found: list[int] = oracle.generate(
        torch.tensor([ids]),
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        do_sample=False,
        use_cache=False,
    )[0, 1:].tolist()
    return found


@torch.inference_mode()
def reference(oracle: Any, source: list[int], target: list[int]) -> torch.Tensor:
    given = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([target])}
    logits: torch.Tensor = oracle(**given, use_cache=False).logits[0].float()
    return logits


@dataclass
class EncodedDriver(Driver):
    """A driver whose sequences have prompts, read when their first tokens come."""

    sources: dict[int, Running] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.model, EncoderDecoder)
        slots = Slots(1, 1, torch.device("cpu"))
        self.reader = Reader(self.model, self.backend, slots, None, self.block_size)

    def begin(self, number: int, source: list[int]) -> None:
        request = Request(id=str(number), prompt_ids=source, params=SamplingParams())
        options: Any = {"seed": 0, "max_length": 99, "root": b"", "start_id": 0}
        sequence = self.sources[number] = Running(request, 0, **options)
        sequence.source_blocks = [[self.free.pop() for _ in range(-(-len(source) // 4))]]
        sequence.source_hits = [False]

    def prepared(self, work: Sequence[tuple[int, Sequence[int]]], shift: int = 0) -> Batch:
        rows = [Row(self.sources[n], self.lengths.get(n, 0), len(ids), False) for n, ids in work]
        self.reader.read(rows)
        batch = self.batch(work, shift)
        self.reader.show(rows, batch)
        return batch


def stepwise(driver: EncodedDriver, oracle: Any) -> float:
    """Largest difference over two prompts read at once, and answers that are known for a part."""
    sources = [prompt(1, LONG), prompt(2, SHORT)]
    targets = [[0, *prompt(3, FIRST + 25)], [0, *prompt(4, 27)]]
    rows: list[list[torch.Tensor]] = [[], []]
    for number, source in enumerate(sources):
        driver.begin(number, source)
    starts = [FIRST, 1]  # one goes on after a preemption
    work = [(n, ids[:start]) for n, (ids, start) in enumerate(zip(targets, starts, strict=True))]
    while work:
        for (number, _), logits in zip(work, driver.step(work), strict=True):
            rows[number].append(logits)
        at = driver.lengths
        work = [(n, ids[at[n] : at[n] + 1]) for n, ids in enumerate(targets) if at[n] < len(ids)]
    pairs = zip(rows, sources, targets, strict=True)
    return max(worst(found, reference(oracle, *ids)) for found, *ids in pairs)
