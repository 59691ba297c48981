"""The workloads are those whose figures others have published: to the token."""

import json
import random
from pathlib import Path

import pytest

from kvrun.bench import workloads
from kvrun.errors import InvalidRequest, NotFound


@pytest.mark.parametrize(
    ("name", "requests", "total_input", "total_output"),
    [("mixed256", 256, 142_827, 133_966), ("mixed1000", 1000, 292_129, 296_078)],
)
def test_the_mixed_workloads_have_the_published_counts(
    name: str, requests: int, total_input: int, total_output: int
) -> None:
    work = workloads.find(name)
    assert len(work.prompts) == len(work.output_tokens) == requests
    assert (work.total_input, work.total_output) == (total_input, total_output)


def test_ids_are_drawn_in_the_published_order() -> None:
    draw = random.Random(0)
    first = [draw.randint(0, 10000) for _ in range(draw.randint(100, 1024))]
    assert workloads.mixed("mixed256").prompts[0] == first
    draw = random.Random(1 + 7919 * 3 + 5)
    prompts = [[draw.randint(0, 10000) for _ in range(5)] for _ in range(3)]
    assert workloads.fixed(3, 5) == prompts
    assert workloads.fixed(3, 5, seed=2) != prompts


def test_named_workloads() -> None:
    work = workloads.find("prefill8x8192")
    assert work.total_input == 65536
    assert list(work.output_tokens) == [1] * 8
    assert workloads.find("ttft512", seed=10).prompts == workloads.fixed(1, 512, 10)
    work = workloads.find("128/32", count=3)
    assert [(len(p), n) for p, n in work.requests()] == [(128, 32)] * 3
    assert work.longest == 160


def test_ids_stay_inside_a_small_vocabulary_and_a_large_one_changes_nothing() -> None:
    work = workloads.find("64/1", count=4)
    assert max(map(max, work.prompts)) > 4096  # type: ignore[type-var]
    small = work.within(4096)
    assert max(map(max, small.prompts)) < 4096  # type: ignore[operator, type-var]
    assert small.prompts != work.prompts
    assert work.within(128_256) == work


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    lines = [{"prompt": "hello"}, {"prompt": [1, 2, 3], "output_tokens": 9, "other": None}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    work = workloads.find(str(path), output_len=5)
    assert list(work.requests()) == [("hello", 5), ([1, 2, 3], 9)]
    assert work.has_text
    assert len(workloads.find(str(path), count=1).prompts) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "no 'prompt'"),
        ('{"prompt": ""}', "no 'prompt'"),
        ('{"prompt": [1, -2]}', "no 'prompt'"),
        ('{"prompt": [true]}', "no 'prompt'"),
        ('{"prompt": "x", "output_tokens": 0}', "at least 1"),
        ('{"prompt": "x", "output_tokens": "9"}', "at least 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "good"}\n' + line)
    with pytest.raises(InvalidRequest, match=f"line 2.*{said}"):
        workloads.read_jsonl(path)


def test_what_is_no_workload(tmp_path: Path) -> None:
    for name in ("mixed", "128", "0/5", "a/b", "1/2/3"):
        with pytest.raises(InvalidRequest, match=f"no workload '{name}'"):
            workloads.find(name)
    with pytest.raises(NotFound):
        workloads.find(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidRequest, match="holds no prompts"):
        workloads.find(str(tmp_path / "empty.jsonl"))
    with pytest.raises(InvalidRequest, match="always has 256"):
        workloads.find("mixed256", count=3)
