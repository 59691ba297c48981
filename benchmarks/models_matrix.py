"""Runs the tests of model families, and all families with all ways of quantizing and attending,
and writes what passed to docs/models.md.

python benchmarks/models_matrix.py
"""

import ast
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import models_runs as runs  # noqa: E402
import pytest  # noqa: E402

from kvrun.runtime.attention import _compiled, triton  # noqa: E402
from kvrun.runtime.config import QUANTIZE  # noqa: E402
from tests.runtime.models import coded  # noqa: E402
from tests.runtime.vision import eyes  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
FOLDER = ROOT / "kvrun" / "runtime" / "models"
TESTS = [ROOT / "tests" / "runtime" / part for part in ("models", "vision")]
# Test -> column. A cell is filled when every test of that column passed for every variant.
PARITY = {
    "test_prefill_and_steps": "logits",
    "test_published_arithmetic": "logits",
    "test_chunks_beside_decodes_and_a_shared_prefix": "chunks, prefix",
    "test_64_greedy_tokens": "64 tokens",
    "test_bfloat16_is_as_near_to_float32_as_transformers_is": "bfloat16",
    "test_the_order_of_kernels_gives_the_same_logits": "order of kernels",
}
MORE = {
    "test_two_ranks_are_one_model": "two ranks",
    "test_all_products_change_beside_the_base": "LoRA",
}
IMAGES = {
    "test_features_are_those_of_transformers": "features",
    "test_logits_of_whole_prompts_and_chunks": "logits, chunks",
    "test_64_greedy_tokens_beside_text_in_chunks_and_preempted": "64 tokens",
    "test_a_prefix_is_hit_with_the_same_image_only": "prefix",
    "test_two_ranks_see_what_one_sees": "two ranks",
    "test_the_order_of_kernels_gives_the_same_features": "order of kernels",
}
MUTATIONS = "mistakes caught"
INTRODUCTION = """# Model families

Written by `python benchmarks/models_matrix.py` from a run of the tests; do not edit.

The checkpoints are small and random, with matrices of standard deviation 0.2 and random biases and
norms, so that mistakes show. "yes": all variants of the family passed; "no" and "in part" are in
the words of the refusal; "-": there is nothing to test.

## Parity

Every family is compared with transformers, but for Baichuan, which transformers does not have and
which is compared with its published arithmetic.

* **logits**: a ragged prompt and single steps behind it, in fp32, within 1e-4 of every logit.
* **chunks, prefix**: prompts in chunks beside other sequences' single tokens, and a prefix shared
  with another sequence. Families with recurrent layers share no prefixes: "chunks".
* **64 tokens**: greedy answers are the same, token by token.
* **bfloat16**: no further from the fp32 logits than transformers in bfloat16 is.
* **order of kernels**: what a GPU runs, with the plain-torch twins of its kernels.
* **mistakes caught**: deliberate faults in what is read or computed (a window off, biases lost,
  heads in another order, ...) that the comparison must notice, and does.

"""
SCALED = """
Scaled rotations: linear, dynamic, llama3, yarn, longrope; the two lists of longrope are chosen
between once for an engine, by its longest context (`max_model_len`), so that no answer depends on
its neighbours. Of latent attention (DeepSeek) the cache keeps the latent, one key for all heads.

T5, mT5 and UMT5 have an encoder that reads a prompt once. What it makes of it lies in blocks of the
same cache until the answer has ended, and requests with the same prompt share it. A GPU's steps are
not captured; they have neither log-probabilities nor embeddings of a prompt.

Any other causal model of transformers that reaches attention by its interface runs by
transformers' own code on kvrun's paged attention, and a line says so; `--no-fallback` refuses it.
When such a model is loaded, two packed sequences in chunks must give what each gives alone, else
it is refused, as are recurrent layers, attention in chunks or by index, encoders, and rotations
that depend on the longest sequence beyond the length where they do. Adapters, quantized weights
and CUDA graphs are not there for these. `kvrun show` says which way a model takes. In the tests:
Apertus, HunYuan dense, ERNIE 4.5 MoE, VaultGemma, Persimmon.

On one H100 every family, those that take images too, gave the CPU's log-probabilities, tokens and
states of embeddings in fp32 within 1e-3, captured and launched, and in bfloat16 was about as far
from them as a CPU in bfloat16 is; so were all codes and adapters of every kind
(`pytest -m gpu tests/gpu`).
"""
WEIGHTS = """
## Quantized weights

The quantized model gives the logits of the same model with the values of its codes in their place,
in fp32 within 1e-4 of every logit: so codes, scales, cuts, experts and what stays in 16 bits are
right, whatever rounding costs (for that see quantize.md). `--quantize`: rounded as it is read.
Stored formats (the hub's `quant_method`) are read by one rank and by two: compressed-tensors
packed, in int8, e4m3, mxfp4 and nvfp4, bitsandbytes in 4 and 8 bits, gptq with and without
act-order. Experts in one tensor are plain in these files, as most tools leave them; gpt-oss has
them in mxfp4.
`kvrun quantize`: a folder in int8 holds what rounding makes, and is read back.

"""
ATTENTION = """
## Attention, adapters, ranks, images

* **{backends}**: attention backends: refused in their words, or the logits within 1e-4 of those of
  sdpa, which all other tests run on. Triton's kernels are interpreted on CPU, and FlashInfer's are
  a stand-in for the package. Sizes of heads are apart from that: Triton takes {low} to {high}
  dimensions, FlashInfer {sizes}.
* **LoRA**: an adapter on every product of the layers says what weights with its changes say, beside
  rows without it. Those on experts, embeddings and heads are compared with PEFT's own forward.
* **two ranks**: two ranks that keep their cut of every tensor give the logits that one gives.
* **images**: which models that see have it as their text part, in the tests; see below.

"""
SEEING = """
## Models that see images

See images.md; of others that see (Gemma 3, Llama 4) the text part is read. Features, logits and
answers are those of transformers.

"""


class Outcomes:
    """What became of each test, by family and column, in `results`."""

    def __init__(self, results: runs.Results) -> None:
        self.variants: dict[str, set[str]] = defaultdict(set)
        self.caught: dict[str, list[bool]] = defaultdict(list)
        self._results = results
        self._where: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            found = self._place(item)
            if found is not None:
                self._where[item.nodeid] = found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self._where and (report.when == "call" or report.failed):
            family, column = self._where[report.nodeid]
            if column == MUTATIONS:
                self.caught[family].append(report.passed)
            else:
                self._results.found[family, column].append(report.passed)

    def _place(self, item: pytest.Item) -> tuple[str, str] | None:
        test: Any = item
        params = test.callspec.params if hasattr(test, "callspec") else {}
        if "vision" in item.path.parts:
            column = IMAGES.get(test.originalname)
            return None if column is None else (f"sees {params['family']}", column)
        if "mutation_shows" in test.originalname:
            tables = vars(test.module)
            for table in ("CONFIG_MUTATIONS", "TENSOR_MUTATIONS", "CODE_MUTATIONS"):
                if params.get("name") in tables[table] and table.split("_")[0].lower() in item.name:
                    return tables[table][params["name"]][0], MUTATIONS
        column = (PARITY | MORE).get(test.originalname)
        if column is None:
            return None
        family, variant = params.get("model", (params.get("family"), params.get("variant")))
        if family is None:
            family, variant = "baichuan", test.callspec.id if params else None
        if variant is not None:
            self.variants[family].add(variant)
        return family, column


def page(results: runs.Results, outcomes: Outcomes) -> str:
    paths = sorted(FOLDER.glob("[a-z]*.py"))
    about_all = {path.stem: about(path) for path in paths}
    parity = list(dict.fromkeys(PARITY.values()))
    rows = []
    for path in paths:
        family = path.stem
        cells = [results.cell(family, column) for column in parity]
        caught = outcomes.caught[family]
        if "layers.mamba" in path.read_text(encoding="utf-8"):
            at = parity.index("chunks, prefix")
            cells[at] = cells[at].replace("yes", "chunks")
        named = ", ".join(sorted(outcomes.variants[family]))
        counted = f"{sum(caught)} of {len(caught)}" if caught else "-"
        rows.append([f"`{family}`", about_all[family], named, *cells, counted])
    parts = [INTRODUCTION, table(["what it is", "variants", *parity, MUTATIONS], rows), SCALED]
    weights = [*map(runs.heading, QUANTIZE), *coded.FORMS, runs.MXFP4, runs.WRITTEN]
    rows = [[f"`{f}`", *(results.cell(f, column) for column in weights)] for f in about_all]
    parts += [WEIGHTS, table(weights, rows)]
    told = {"low": triton.HEAD_DIMS[0], "high": triton.HEAD_DIMS[1]}
    sizes = ", ".join(map(str, _compiled.HEAD_DIMS))
    parts.append(ATTENTION.format(backends=", ".join(runs.BACKENDS), sizes=sizes, **told))
    columns = [*runs.BACKENDS, *MORE.values()]
    rows = []
    for family in about_all:
        cells = [results.cell(family, column) for column in sorted(columns, key=columns.index)]
        rows.append([f"`{family}`", *cells, seen_with(results, family)])
    parts += [table([*columns, "images"], rows), SEEING]
    columns = list(IMAGES.values())
    rows = [
        [f"`{kind}`", text_part(kind), *(results.cell(f"sees {kind}", c) for c in columns)]
        for kind in eyes.FAMILIES
    ]
    parts += [table(["text part", *columns], rows), notes(results)]
    return "".join(parts)


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [["`model_type`", *columns], ["---"] * (len(columns) + 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def text_part(kind: str) -> str:
    text = eyes.FAMILIES[kind].get("text_config", {})
    return str(text.get("model_type", kind.split("-")[0]))


def seen_with(results: runs.Results, family: str) -> str:
    """The models that see whose text part it was, if all of their tests passed."""
    kinds = [kind for kind in eyes.FAMILIES if text_part(kind) == family]
    passed = [
        k for k in kinds if "**no**" not in [results.cell(f"sees {k}", c) for c in IMAGES.values()]
    ]
    return ", ".join(dict.fromkeys(kind.split("-")[0] for kind in passed)) or "-"


def notes(results: runs.Results) -> str:
    return "\n" + "".join(f"[^{number}]: {reason}\n" for reason, number in results.notes.items())


def about(path: Path) -> str:
    """The docstring of a family's file, up to where it names its source."""
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(told.split("Source:")[0].split()).rstrip(".")


def main() -> int:
    results = runs.Results()
    outcomes = Outcomes(results)
    # What is run behind the tests has been imported already.
    known = ["-n", "0", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main(["-q", *known, *map(str, TESTS)], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    runs.run_all(results)
    PAGE.write_text(page(results, outcomes), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
