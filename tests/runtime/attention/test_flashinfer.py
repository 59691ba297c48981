"""The flashinfer backend on a stand-in for the package: who attends what, and when it is taken."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kvrun.errors import InvalidRequest, KvrunError, MissingExtra, Unsupported
from kvrun.folder import load
from kvrun.runtime.attention import AttentionSpec, _compiled
from kvrun.runtime.engine import start
from tests.runtime.attention import fake_flashinfer
from tests.runtime.attention.test_sdpa import close, run

CUDA = torch.device("cuda")
HOPPER = (9, 0)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[list[Any]]]:
    """A machine with a Hopper GPU, the package, and nothing compiled yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(_compiled, "version", lambda name: "0.6.13")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    yield fake_flashinfer.install(monkeypatch, tmp_path)
    fake_flashinfer.uninstall()


@pytest.fixture
def backend(asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its file, for tensors on the CPU, where 6 queries are many."""
    found = load("kvrun.runtime.attention", "flashinfer")
    monkeypatch.setattr(found, "LONG", 6)
    monkeypatch.setattr(found, "FAR", 0)
    monkeypatch.setattr(found, "_pinned", lambda values: torch.tensor(values, dtype=torch.int32))
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    return found


def spec(**options: Any) -> AttentionSpec:
    return AttentionSpec(layer=0, heads=4, kv_heads=2, head_dim=64, scale=0.2, **options)


STEPS = {
    "one prompt": [(0, 9)],
    "one chunk": [(7, 9)],
    "singles and short ones only": [(5, 1), (0, 3), (4, 5)],
    "all at once": [(3, 1), (8, 1), (0, 3), (0, 6), (2, 4), (0, 2), (5, 8), (9, 2)],
    "more than are planned": [(0, 7), (1, 6), (0, 6), (3, 6), (0, 8), (2, 7)],
}


@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 0.7}], ids=str)
def test_every_sequence_gets_its_own_attention(
    backend: ModuleType, lengths: list[tuple[int, int]], options: dict[str, Any]
) -> None:
    assert close(run(spec(**options), lengths, make=backend.Attention))
    many = sum(new >= backend.LONG for _, new in lengths)
    last = [wrapper.plans[-1] for wrapper in fake_flashinfer.Wrapper.made if wrapper.plans]
    assert bool(last) == bool(many)
    for cached, new in [(c, n) for c, n in lengths if n >= backend.LONG][: backend.MOST]:
        assert (new, cached + new) in last


def test_what_does_not_fit_is_not_gathered(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "GATHERED", 2 * 4 * 2 * 2 * 64 * 4)  # two blocks of 4 tokens
    assert close(run(spec(), [(2, 6), (3, 6), (0, 20)], make=backend.Attention))
    planned = [plan for wrapper in fake_flashinfer.Wrapper.made for plan in wrapper.plans]
    assert planned == [(6, 8), (20, 20)]


def test_a_plan_is_written_over_only_when_it_has_been_copied(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []
    made = iter(range(100))

    def event() -> SimpleNamespace:
        number = next(made)
        return SimpleNamespace(record=lambda: None, synchronize=lambda: waited.append(number))

    monkeypatch.setattr(torch.cuda, "Event", event)
    kind = backend.Kind(4, 2, 64, 0.2, None, None)
    ring = backend._Ring(torch.empty(0))
    long = backend.Long(slice(0, 9), 9, 9, None)
    wrappers = [ring.plan(kind, long, torch.float32) for _ in range(backend.RING + 2)]
    assert len(set(map(id, wrappers))) == backend.RING
    assert waited == [0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alibi": torch.ones(4)}, "no alibi"),
        ({"sinks": torch.ones(4)}, "no sinks"),
        ({"chunk": 8}, "no chunk"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_its_kernels_cannot_do(
    backend: ModuleType, options: dict[str, Any], words: str
) -> None:
    reject: Callable[..., str | None] = backend.Attention.reject
    assert reject(spec(window=9, softcap=2.0), CUDA) is None
    assert words in str(reject(spec(**options), CUDA))
    odd = AttentionSpec(layer=0, heads=4, kv_heads=2, head_dim=80, scale=1.0)
    assert "80 dimensions" in str(reject(odd, CUDA))
    assert "CUDA" in str(reject(spec(), torch.device("cpu")))


def test_other_devices_are_left_to_triton(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "capability 9" in str(backend.Attention.reject(spec(), CUDA))
    assert "capability 9" in str(_compiled.missing([spec()], BF16, BF16, CUDA))


def choose(
    wanted: str, specs: list[AttentionSpec], dtype: torch.dtype = BF16, kept: torch.dtype = BF16
) -> str | None:
    return start._without_flashinfer(wanted, specs, dtype, kept, CUDA)


def test_auto_takes_it_once_its_modules_are_compiled(asked: list[list[Any]]) -> None:
    specs = [spec(), spec(window=128)]
    said = choose("auto", specs)
    assert said == "bf16-64, bf16-64-window not compiled (kvrun env --compile)"
    assert "kvrun.runtime.attention.flashinfer" not in sys.modules, "looking imports nothing"
    told: list[str] = []
    build = load("kvrun.runtime.attention", "flashinfer").compile_modules
    build(["bf16-64"], told.append)
    assert choose("auto", specs) == "bf16-64-window not compiled (kvrun env --compile)"
    build(["bf16-64", "bf16-64-window"], told.append)
    assert choose("auto", specs) is None
    assert told[:3] == [
        "[1/1] bf16-64: compiling ...", "[1/1] bf16-64: 0 s", "[1/2] bf16-64: there already",
    ]  # fmt: skip
    assert [(what[5], what[8:10]) for what in asked] == [(64, [False, False]), (64, [True, False])]
    assert "no alibi" in str(choose("auto", [spec(alibi=torch.ones(4))]))
    assert choose("triton", specs) == ""
    assert start.choose_backend("flashinfer", specs, CUDA)[0] == "flashinfer"


@pytest.mark.parametrize(
    ("dtype", "kept", "words"),
    [(torch.float32, torch.float32, "float32"), (BF16, FP8, "8 bits")],
    ids=["float32", "fp8"],
)
def test_auto_says_what_it_does_not_compute(
    asked: list[list[Any]], dtype: torch.dtype, kept: torch.dtype, words: str
) -> None:
    assert words in str(choose("auto", [spec()], dtype, kept))


def test_asked_for_by_name_it_says_why_not(
    asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unsupported) as caught:
        choose("flashinfer", [spec()])
    assert "kvrun env --compile" in caught.value.cause

    def nothing(name: str) -> str:
        raise _compiled.PackageNotFoundError(name)

    monkeypatch.setattr(_compiled, "version", nothing)
    with pytest.raises(Unsupported) as caught:
        choose("flashinfer", [spec()])
    assert "pip install 'kvrun[cuda]'" in caught.value.cause
    assert "not installed" in str(choose("auto", [spec()]))


def test_compiling_is_refused_without_what_it_needs(
    backend: ModuleType, asked: list[list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[str] = []

    def refused() -> KvrunError:
        with pytest.raises(KvrunError) as caught:
            backend.compile_modules([], told.append)
        return caught.value

    with pytest.raises(InvalidRequest, match="bf16-96") as caught:
        backend.compile_modules(["bf16-96"], told.append)
    assert "bf16-128" in caught.value.hint
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: None if name == "ninja" else "/bin/x")
    assert "ninja" in refused().what
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "nvcc" in refused().what
    assert str(tmp_path) in refused().cause
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert "capability 9" in refused().cause
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in refused().cause
    assert asked == told == []


def test_a_compiler_that_fails_is_one_message(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(verbose: bool) -> None:
        raise RuntimeError("Ninja build failed\nnvcc fatal: out of memory")

    monkeypatch.setattr(backend, "gen_batch_prefill_module", lambda *_: SimpleNamespace(build=fail))
    with pytest.raises(KvrunError, match="bf16-128 could not be compiled") as caught:
        backend.compile_modules(["bf16-128"], lambda line: None)
    assert caught.value.cause == "nvcc fatal: out of memory"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    fake_flashinfer.uninstall()
    with pytest.raises(MissingExtra) as caught:
        load("kvrun.runtime.attention", "flashinfer")
    assert "kvrun[cuda]" in caught.value.hint
