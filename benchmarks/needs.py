"""What a benchmark needs of a machine: where it is missing, one line says so and nothing begins."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch


def gpu(instead: str, *, triton: bool = False) -> None:
    """Ends the program with code 2 without a CUDA device, or without Triton where it is needed.

    `instead` is what can be run on a CPU.
    """
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            why, remedy = "this torch is built without CUDA", "install one for CUDA"
        else:
            why, remedy = "torch finds none", "run it where there is one"
        _end("a CUDA GPU", why, f"{remedy}, or {instead}")
    if triton:
        package("triton", "Triton")


def package(name: str, called: str) -> None:
    """Ends the program with code 2 where a package is not installed."""
    if find_spec(name) is None:
        _end(called, "it is not installed", f"pip install {name}")


def _end(what: str, why: str, hint: str) -> NoReturn:
    print(f"{Path(sys.argv[0]).name} needs {what}: {why}; {hint}", file=sys.stderr)
    sys.exit(2)
