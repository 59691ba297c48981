"""What these programs measure on: where there is no GPU, one line says so and nothing begins."""

import sys
from pathlib import Path

import torch


def needed() -> None:
    """Ends the program with code 2 without a CUDA device."""
    if not torch.cuda.is_available():
        name = Path(sys.argv[0]).name
        print(f"{name} measures kernels on a CUDA GPU, and torch finds none here.", file=sys.stderr)
        print("pytest tests/runtime/kernels runs them in an interpreter.", file=sys.stderr)
        sys.exit(2)
