"""Runs the tests of model families and writes what passed to docs/models.md.

python benchmarks/models_matrix.py
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
FOLDER = ROOT / "kvrun" / "runtime" / "models"
# Test -> column. A cell is filled when every test of that column passed for every variant.
COLUMNS = {
    "test_prefill_and_steps": "logits",
    "test_published_arithmetic": "logits",
    "test_chunks_beside_decodes_and_a_shared_prefix": "chunks, prefix",
    "test_64_greedy_tokens": "64 tokens",
    "test_bfloat16_is_as_near_to_float32_as_transformers_is": "bfloat16",
    "test_two_ranks_are_one_model": "two ranks",
    "test_the_order_of_kernels_gives_the_same_logits": "order of kernels",
}
MUTATIONS = "mistakes caught"
INTRODUCTION = """# Model families

Written by `python benchmarks/models_matrix.py` from a run of the tests; do not edit.

Every family is compared with transformers, but for Baichuan, which transformers does not have and
which is compared with its published arithmetic. The checkpoints are small and random, with matrices
of standard deviation 0.2 and random biases and norms, so that mistakes show.

* **logits**: a ragged prompt and single steps behind it, in fp32, within 1e-4 of every logit.
* **chunks, prefix**: prompts in chunks beside other sequences' single tokens, and a prefix shared
  with another sequence. Families with recurrent layers share no prefixes: "chunks".
* **64 tokens**: greedy answers are the same, token by token.
* **bfloat16**: no further from the fp32 logits than transformers in bfloat16 is.
* **two ranks**: two ranks that keep their cut of every tensor give the logits that one gives.
* **order of kernels**: what a GPU runs, with the plain-torch twins of its kernels.
* **mistakes caught**: deliberate faults in what is read or computed (a window off, biases lost,
  heads in another order, ...) that the comparison must notice, and does.

Images are taken in by LLaVA, LLaVA-NeXT, Idefics2 and Mistral 3 (see images.md); of others that see
them (Gemma 3, Llama 4) the text part is read. Scaled rotations: linear, dynamic, llama3, yarn,
longrope; the two lists of longrope are chosen between once for an engine, by its longest context
(`max_model_len`), so that no answer depends on its neighbours. Of latent attention (DeepSeek) the
cache keeps the latent, one key for all heads. Experts are read plain, in every stored format where
each has tensors of its own, and as mxfp4.

T5, mT5 and UMT5 have an encoder that reads a prompt once. What it makes of it lies in blocks of the
same cache until the answer has ended, and requests with the same prompt share it. Their attention
runs without kvrun's own kernels, so that a GPU's steps are not captured; they have neither
log-probabilities nor embeddings of a prompt, and `kvrun quantize` writes none of them, but rounding
as they are read works.

Any other causal model of transformers that reaches attention by its interface runs by
transformers' own code on kvrun's paged attention, and a line says so; `--no-fallback` refuses it.
When such a model is loaded, two packed sequences in chunks must give what each gives alone, else
it is refused, as are recurrent layers, attention in chunks or by index, encoders, and rotations
that depend on the longest sequence beyond the length where they do. Adapters, quantized weights
and CUDA graphs are not there for these. `kvrun show` says which way a model takes. In the tests:
Apertus, HunYuan dense, ERNIE 4.5 MoE, VaultGemma, Persimmon.

Llama and Qwen 3 have been measured on a GPU. There, greedy answers of small random checkpoints in
fp32 were those of the CPU or of transformers for mixtral, deepseek_v2, deepseek_v3, gpt2,
gemma3_text, gpt_oss, cohere, bloom, falcon, llama4_text, mamba, mamba2, granitemoehybrid, t5, the
families that take images, and Apertus by transformers' code. What a GPU runs for the others is
tested by the twins of its kernels, on CPU.

"""


class Outcomes:
    """What became of each test, by family and column."""

    def __init__(self) -> None:
        self.variants: dict[str, set[str]] = defaultdict(set)
        self.passed: dict[tuple[str, str], list[bool]] = defaultdict(list)
        self._where: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            found = self._place(item)
            if found is not None:
                self._where[item.nodeid] = found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self._where and (report.when == "call" or report.failed):
            self.passed[self._where[report.nodeid]].append(report.passed)

    def _place(self, item: pytest.Item) -> tuple[str, str] | None:
        test: Any = item
        params = test.callspec.params if hasattr(test, "callspec") else {}
        if "mutation_shows" in test.originalname:
            tables = vars(test.module)
            for table in ("CONFIG_MUTATIONS", "TENSOR_MUTATIONS", "CODE_MUTATIONS"):
                if params.get("name") in tables[table] and table.split("_")[0].lower() in item.name:
                    return tables[table][params["name"]][0], MUTATIONS
        column = COLUMNS.get(test.originalname)
        if column is None:
            return None
        family, variant = params.get("model", (params.get("family"), params.get("variant")))
        if family is None:
            family, variant = "baichuan", test.callspec.id
        self.variants[family].add(variant)
        return family, column


def page(outcomes: Outcomes) -> str:
    columns = list(dict.fromkeys(COLUMNS.values()))
    rows = [
        f"| `model_type` | what it is | variants | {' | '.join(columns)} | {MUTATIONS} |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for path in sorted(FOLDER.glob("[a-z]*.py")):
        family = path.stem
        cells = [cell(outcomes.passed[family, column]) for column in columns]
        caught = outcomes.passed[family, MUTATIONS]
        named = ", ".join(sorted(outcomes.variants[family]))
        counted = f"{sum(caught)} of {len(caught)}" if caught else ""
        if "layers.mamba" in path.read_text(encoding="utf-8"):
            at = columns.index("chunks, prefix")
            cells[at] = cells[at].replace("yes", "chunks")
        cells = [f"`{family}`", about(path), named, *cells, counted]
        rows.append(f"| {' | '.join(cells)} |")
    return INTRODUCTION + "\n".join(rows) + "\n"


def cell(passed: list[bool]) -> str:
    return "" if not passed else "yes" if all(passed) else "**no**"


def about(path: Path) -> str:
    """The docstring of a family's file, up to where it names its source."""
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(told.split("Source:")[0].split()).rstrip(".")


def main() -> int:
    outcomes = Outcomes()
    code = pytest.main(["-q", str(ROOT / "tests" / "runtime" / "models")], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    PAGE.write_text(page(outcomes), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
