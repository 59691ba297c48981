"""The rules of docs/architecture.md, enforced on the source: imports, sizes, banned calls."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kvrun import folder

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "kvrun").rglob("*.py"))
EVERYWHERE = ("kvrun.folder", "kvrun.errors", "kvrun.http", "kvrun")

# What the rooms above the runtime may see of it.
FRONT_DOOR = tuple(
    f"kvrun.runtime.{name}"
    for name in ("engine.client", "engine.request", "sampling.params", "config", "text", "plan")
)
# Room -> the prefixes it may import besides itself and EVERYWHERE.
ABOVE = {
    "kvrun.cli": (
        "kvrun.llm", "kvrun.hub", "kvrun.chat", "kvrun.bench", "kvrun.tui", "kvrun.server",
        *FRONT_DOOR, "kvrun.runtime.calibrate", "kvrun.runtime.quant", "kvrun.runtime.lora",
    ),
    "kvrun.tui": ("kvrun.chat", "kvrun.hub", *FRONT_DOOR),
    "kvrun.server": ("kvrun.chat", "kvrun.hub", *FRONT_DOOR),
    "kvrun.chat": ("kvrun.hub", *FRONT_DOOR),
    "kvrun.llm": ("kvrun.hub", "kvrun.runtime"),
    "kvrun.bench": ("kvrun.hub", "kvrun.runtime", "kvrun.llm"),
    "kvrun.hub": ("kvrun.runtime.plan",),
    "kvrun.__main__": ("kvrun.cli",),
}  # fmt: skip
# The three layers of the runtime, top first; imports run downward or stay inside a layer.
LAYERS = (
    ("engine", "calibrate", "fallback"),
    ("models", "layers", "vision", "lora", "speculate"),
    (
        "attention", "cache", "quant", "sampling", "checkpoint", "parallel", "batch", "text",
        "plan", "config", "kernels", "hf_config", "tensorfile", "device",
        "source", "image",
    ),
)  # fmt: skip
SLOW = {"torch", "transformers", "textual", "fastapi"}
BANNED_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "abc", "yaml"}
LAZY_CALLERS = ("kvrun.folder", "kvrun", "kvrun.cli")


def module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def inside(name: str, prefixes: tuple[str, ...] | str) -> bool:
    prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
    return any(name == p or name.startswith(p + ".") for p in prefixes)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST, *, nested: bool = True) -> Iterator[ast.AST]:
    """Every node below `node` outside TYPE_CHECKING; `nested=False` stays out of functions."""
    for child in ast.iter_child_nodes(node):
        if type_checking(child):
            continue
        yield child
        if nested or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(child, nested=nested)


MODULES = {module(p): p for p in FILES}


def imports(path: Path, *, nested: bool = True) -> set[str]:
    """The modules a file imports; `from kvrun.x import y` counts as x.y where that is a module."""
    found = set()
    for node in statements(tree(path), nested=nested):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            source = node.module or ""
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.add(full if full in MODULES else source)
    return found


def ours(path: Path, **kwargs: bool) -> set[str]:
    return {name for name in imports(path, **kwargs) if inside(name, "kvrun")}


def layer(name: str) -> int | None:
    parts = name.split(".")
    if parts[:2] != ["kvrun", "runtime"] or len(parts) < 3:
        return None
    for depth, rooms in enumerate(LAYERS):
        if parts[2] in rooms:
            return depth
    raise AssertionError(f"{name}: runtime has no such room; say in which layer it lies")


@pytest.mark.parametrize("path", FILES, ids=module)
def test_rooms_import_what_they_may(path: Path) -> None:
    me = module(path)
    room = next((r for r in ABOVE if inside(me, r)), None)
    for name in ours(path):
        if room:
            assert name in EVERYWHERE or inside(name, (room, *ABOVE[room])), f"{me} -> {name}"
        elif inside(me, "kvrun.runtime"):
            allowed = inside(name, "kvrun.runtime") or name in EVERYWHERE
            assert allowed, f"{me} -> {name}"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_runtime_imports_run_downward(path: Path) -> None:
    mine = layer(module(path))
    for name in ours(path):
        theirs = layer(name)
        if mine is not None and theirs is not None:
            assert theirs >= mine, f"{module(path)} -> {name} runs upward"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_private_rooms(path: Path) -> None:
    me, names = module(path), imports(path)
    if inside(me, "kvrun.runtime"):
        banned = ("typer", "textual", "fastapi", "huggingface_hub", "kvrun.hub")
        assert not [n for n in names if inside(n, banned)]
    if inside(me, "kvrun.runtime.kernels"):
        room = "kvrun.runtime.kernels"
        assert not [n for n in names if inside(n, "kvrun") and not inside(n, room)]
    if inside(me, "kvrun.runtime.models") and me != "kvrun.runtime.models":
        allowed = ("kvrun.runtime.layers", "kvrun.runtime.vision", "kvrun.runtime.models", "torch")
        stdlib = {n for n in names if n.split(".")[0] in sys.stdlib_module_names}
        assert not [n for n in names - stdlib if not inside(n, allowed)]
    # hub.tokenizer runs in a process of its own, by `kvrun pull` only.
    if not inside(me, ("kvrun.runtime.fallback", "kvrun.runtime.vision", "kvrun.hub.tokenizer")):
        assert not [n for n in names if inside(n, "transformers")]


def test_no_import_cycle() -> None:
    graph = {name: ours(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for other in graph[name]:
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=module)
def test_sizes_and_names(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.name not in {"utils.py", "helpers.py"}
    docstring = ast.get_docstring(tree(path))
    assert docstring, "the first line of a file says its room's job"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 60, f"{node.name} is too long"
        if isinstance(node, ast.ClassDef):
            assert not node.name.startswith("Base")
            assert not node.name.endswith("Manager")


@pytest.mark.parametrize("name", folder.names("kvrun.runtime.models"))
def test_a_family_is_one_page(name: str) -> None:
    """What is general about it lies in layers."""
    lines = MODULES[f"kvrun.runtime.models.{name}"].read_text().splitlines()
    assert 1 <= len(lines) <= 60


@pytest.mark.parametrize("path", FILES, ids=module)
def test_lazy_imports_go_through_folder(path: Path) -> None:
    me = module(path)
    if me in LAZY_CALLERS or inside(me, "kvrun.cli"):
        return
    late = imports(path) - imports(path, nested=False)
    assert not late, f"{me} imports {late} inside a function; use kvrun.folder.load"
    assert "importlib" not in imports(path)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_banned_calls(path: Path) -> None:
    assert not {n.split(".")[0] for n in imports(path)} & BANNED_MODULES
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in {"eval", "exec", "__import__", "time.time"}, name
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert "trust_remote_code" not in keywords
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_messages_name_only_files_that_everybody_has(path: Path) -> None:
    """A wheel holds kvrun/ and nothing else."""
    explained = {
        id(node.body[0].value)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            told = re.search(r"\b(docs|benchmarks|recipes|tests)/", node.value)
            assert id(node) in explained or not told, node.value


def loaded(code: str) -> set[str]:
    """The top-level packages loaded after running `code` in a fresh interpreter."""
    script = f"import sys\n{code}\nprint('\\n'.join({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import kvrun",
        "import kvrun.cli\ntry:\n    kvrun.cli.main(['--help'])\nexcept SystemExit:\n    pass",
        *(f"import {name}" for name in FRONT_DOOR if name in MODULES),
    ],
)
def test_light_imports(code: str) -> None:
    assert not loaded(code) & SLOW
