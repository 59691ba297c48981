"""Workloads: prompts as token ids and how many tokens each answer has, the same on every run."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvrun.errors import InvalidRequest, NotFound

HIGHEST_ID = 10000  # included
# Prompts of different sizes draw from different streams, and so do different seeds.
STRIDE = 7919
MIXED = {  # name: requests, seed, shortest and longest length of prompts and answers
    "mixed256": (256, 0, 100, 1024),
    "mixed1000": (1000, 3, 64, 512),
}
FIXED = {  # name: requests, prompt length, answer length
    "prefill8x8192": (8, 8192, 1),
    "ttft512": (1, 512, 1),
}
HINT = (
    f"one of {', '.join([*MIXED, *FIXED])}; INPUT/OUTPUT as in 128/128; or a .jsonl file whose "
    'lines are {"prompt": text or [ids], "output_tokens": N}'
)

USUAL = 256  # requests

Prompt = str | list[int]


@dataclass(frozen=True)
class Workload:
    """Requests, all there at once: prompts, and the number of tokens of each answer."""

    name: str
    prompts: Sequence[Prompt]
    output_tokens: Sequence[int]

    @property
    def has_text(self) -> bool:
        """Whether prompts are texts, whose tokens only a tokenizer can count."""
        return any(isinstance(prompt, str) for prompt in self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer; texts count as nothing."""
        return max(len(p) * (not isinstance(p, str)) + n for p, n in self.requests())

    @property
    def total_input(self) -> int:
        """Prompt tokens; texts count as nothing."""
        return sum(len(p) for p in self.prompts if not isinstance(p, str))

    @property
    def total_output(self) -> int:
        return sum(self.output_tokens)

    def requests(self) -> Iterator[tuple[Prompt, int]]:
        """Pairs of a prompt and the length of its answer."""
        return zip(self.prompts, self.output_tokens, strict=True)

    def within(self, vocab_size: int) -> "Workload":
        """The same with every id inside a vocabulary smaller than the one it was made for."""
        prompts = [p if isinstance(p, str) else inside(p, vocab_size) for p in self.prompts]
        return Workload(self.name, prompts, self.output_tokens)


def fixed(count: int, length: int, seed: int = 1) -> list[list[int]]:
    """`count` prompts of `length` ids each."""
    random = Random(seed + STRIDE * count + length)
    return [_ids(random, length) for _ in range(count)]


def inside(ids: list[int], vocab_size: int) -> list[int]:
    """The ids of a prompt, those beyond a small vocabulary folded into it."""
    return ids if vocab_size > HIGHEST_ID else [i % vocab_size for i in ids]


def uniform(count: int, input_len: int, output_len: int, seed: int = 1) -> Workload:
    """`count` requests of the same lengths."""
    name = f"{input_len}/{output_len}"
    return Workload(name, fixed(count, input_len, seed), [output_len] * count)


def mixed(name: str) -> Workload:
    """Prompts and answers of random lengths: "mixed256" (nano-vllm's protocol) or "mixed1000"."""
    count, seed, shortest, longest = MIXED[name]
    random = Random(seed)
    prompts = [_ids(random, random.randint(shortest, longest)) for _ in range(count)]
    return Workload(name, prompts, [random.randint(shortest, longest) for _ in range(count)])


def find(name: str, *, count: int | None = None, output_len: int = 128, seed: int = 1) -> Workload:
    """The workload a command names: one of the above, INPUT/OUTPUT, or a JSONL file.

    `count` is how many requests of INPUT/OUTPUT (256 when not said), or at most so many of a file;
    `output_len` is for lines of a file that do not say theirs. Raises InvalidRequest or NotFound.
    """
    if name in MIXED:
        if count is not None:
            raise InvalidRequest(f"{name} always has {MIXED[name][0]} requests.")
        return mixed(name)
    if name in FIXED:
        usual, input_len, answer = FIXED[name]
        count = count or usual
        return Workload(name, fixed(count, input_len, seed), [answer] * count)
    lengths = name.split("/")
    if len(lengths) == 2 and all(n.isdecimal() and int(n) for n in lengths):
        return uniform(count or USUAL, int(lengths[0]), int(lengths[1]), seed)
    if name.endswith((".jsonl", ".json")):
        return read_jsonl(Path(name), count, output_len)
    raise InvalidRequest(f"there is no workload '{name}'.", hint=HINT)


def read_jsonl(path: Path, count: int | None = None, output_len: int = 128) -> Workload:
    """Real prompts: one JSON object a line, {"prompt": text or [ids], "output_tokens": N}.

    `output_tokens` may be left out; other fields are not looked at. Raises NotFound without the
    file and InvalidRequest with the number of a line that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}.", hint=HINT) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read.", cause=str(error)) from error
    prompts: list[Prompt] = []
    outputs: list[int] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (count is None or len(prompts) < count):
            prompt, output = _request(line, f"{path}, line {number}", output_len)
            prompts.append(prompt)
            outputs.append(output)
    if not prompts:
        raise InvalidRequest(f"{path} holds no prompts.", hint=HINT)
    return Workload(path.name, prompts, outputs)


def _request(line: str, where: str, output_len: int) -> tuple[Prompt, int]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{where} is not JSON.", cause=str(error), hint=HINT) from error
    prompt = values.get("prompt") if isinstance(values, dict) else None
    ids = isinstance(prompt, list) and all(type(i) is int and i >= 0 for i in prompt)
    if not prompt or not (ids or isinstance(prompt, str)):
        raise InvalidRequest(f"{where} has no 'prompt' that is a text or a list of ids.", hint=HINT)
    output = values.get("output_tokens", output_len)
    if type(output) is not int or output < 1:
        raise InvalidRequest(f"{where}: 'output_tokens' must be a whole number of at least 1.")
    return prompt, output


def _ids(random: Random, length: int) -> list[int]:
    return [random.randint(0, HIGHEST_ID) for _ in range(length)]
