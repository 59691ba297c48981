"""Errors of a device: which of them leave the process unable to compute anything more."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvrun.errors import EngineDead

OUT_OF_MEMORY = 2
# CUDA's error codes that are about one call and leave the context as it was: invalid value or
# configuration, no kernel for this device, too many resources, not supported.
OF_ONE_CALL = frozenset({1, 9, 98, 209, 701, 801})
# Triton's launcher raises these as plain RuntimeErrors.
TRITON = "Triton Error [CUDA]: "
LOST = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned")


@contextmanager
def of_device() -> Iterator[None]:
    """Raises EngineDead for an error that every further call would get too, MemoryError for what
    does not fit; others pass."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error, torch.AcceleratorError):
            code = getattr(error, "error_code", None)
            if code == OUT_OF_MEMORY:
                raise MemoryError(str(error)) from error
            lost = code not in OF_ONE_CALL
        else:
            said = str(error)
            lost = said.startswith(TRITON) and any(words in said for words in LOST)
        if not lost:
            raise
        raise EngineDead(
            "the device has failed.",
            cause=str(error).splitlines()[0],
            hint="only a new process can use it again",
        ) from error
