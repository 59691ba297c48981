"""A C file becomes a library for this machine's CPU, once: it is kept beside the user's caches."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Sums may be taken in another order; numbers that are not finite stay what they are.
FLAGS = (
    "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-shared", "-fPIC",
)  # fmt: skip
SECONDS = 120.0  # that a compiler may take


def compiled(source: Path) -> ctypes.CDLL | None:
    """`source`, compiled; None where there is no compiler, or one that cannot."""
    compiler = _compiler()
    if compiler is None or platform.system() != "Linux":
        return None
    name = f"{source.stem}-{_fingerprint(source, compiler)}.so"
    try:
        return _kept(source, compiler, name)
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        pass
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _made(source, compiler, Path(folder) / name)
    except OSError:
        return None


def declared(source: Path, **functions: Sequence[Any]) -> ctypes.CDLL | None:
    """As `compiled`, of functions by name: the type of their result, then those of arguments."""
    found = compiled(source)
    if found is not None:
        for name, (result, *arguments) in functions.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    return found


def _compiler() -> str | None:
    found = (shutil.which(name) for name in (os.environ.get("CC"), "gcc", "cc") if name)
    return next((path for path in found if path), None)


def _kept(source: Path, compiler: str, name: str) -> ctypes.CDLL | None:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvrun"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    path = folder / name
    return ctypes.CDLL(str(path)) if path.exists() else _made(source, compiler, path)


def _made(source: Path, compiler: str, path: Path) -> ctypes.CDLL | None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    command = [compiler, *FLAGS, str(source), "-o", str(beside), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS)
        if done.returncode:
            return None
        beside.replace(path)
    except subprocess.TimeoutExpired:
        return None
    finally:
        beside.unlink(missing_ok=True)
    return ctypes.CDLL(str(path))


def _fingerprint(source: Path, compiler: str) -> str:
    """What a library depends on: another CPU of the same home has one of its own."""
    cpu = Path("/proc/cpuinfo")
    known = cpu.read_text().split("\n\n")[0].splitlines() if cpu.exists() else []
    flags = [line for line in known if line.startswith(("flags", "Features", "model name"))]
    texts = (path.read_text() for path in (source, *sorted(source.parent.glob("*.h"))))
    parts = (*texts, compiler, str(os.stat(compiler).st_mtime_ns), *FLAGS, *flags)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
