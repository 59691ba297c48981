"""What the rooms above the engine share: the scripted engine, and a model folder for it."""

import os
import signal
from pathlib import Path
from types import ModuleType

import pytest

# As many tests run side by side as there are processors: more threads would only wait for turns.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton decides when it is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.chat import scripted as module

# A shell that runs tests in the background has them ignore Ctrl+C, and what they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test has the same random values whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def scripted() -> ModuleType:
    """The module itself: tests put its engine where the real one would be."""
    return module


@pytest.fixture(scope="session")
def model(scripted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy tokenizer and chat template, and no weights."""
    return scripted.make_model(tmp_path_factory.mktemp("model"))
