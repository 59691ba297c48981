"""kvrun: run language models on your own machine."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvrun.llm import LLM as LLM
    from kvrun.runtime.sampling.params import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

# Loaded on first use, so that `import kvrun` and `kvrun --help` stay free of torch.
_FACE = {"LLM": "kvrun.llm", "SamplingParams": "kvrun.runtime.sampling.params"}


def __getattr__(name: str) -> object:
    if name not in _FACE:
        raise AttributeError(f"module 'kvrun' has no attribute '{name}'")
    return getattr(importlib.import_module(_FACE[name]), name)
