"""Processor: an image file -> the arrays that a model's tower takes, by transformers' own class.

Only `folder.load` opens this file: it needs Pillow (the extra `vision`), and transformers.
"""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from transformers import AutoImageProcessor

from kvrun.errors import BadCheckpoint, InvalidRequest
from kvrun.runtime.image import Image

FORMATS = ("PNG", "JPEG")
PIXELS = 20_000_000  # of an image, before anything of it is decoded
RATIO = 50  # of its sides; some models scale the short one up to a size of their own
BYTES = 64 << 20  # of a file


class Processor:
    """Raises BadCheckpoint for a folder whose image processor cannot be read."""

    def __init__(self, folder: Path, arrays: tuple[str, ...], options: dict[str, Any]) -> None:
        self._arrays, self._options = arrays, options
        try:
            # Not torchvision's: the same numbers on every machine.
            auto: Any = AutoImageProcessor
            self._process = auto.from_pretrained(str(folder), backend="pil", local_files_only=True)
        except Exception as error:
            raise BadCheckpoint(
                f"the image processor of {folder} cannot be read.",
                cause=str(error).splitlines()[0],
                hint="it is said in preprocessor_config.json or processor_config.json",
            ) from error

    def __call__(self, data: bytes, name: str) -> Image:
        """The image in a file. Raises InvalidRequest for one that is not taken, by its `name`, and
        says why."""
        picture = opened(data, name)
        try:
            made: Any = self._process(picture, return_tensors="np", **self._options)
            if isinstance(made, np.ndarray):  # some give nothing but pixels
                made = {self._arrays[0]: made}
            # Each has one entry for the only image.
            arrays = {name: np.asarray(made[name])[0] for name in self._arrays}
        except Exception as error:
            raise InvalidRequest(
                f"the model's image processor fails on {name}.", cause=str(error)
            ) from error
        return Image.of({name: _plain(name, array) for name, array in arrays.items()})


def _plain(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array.astype(np.uint8 if name.endswith("mask") else np.int64)


def opened(data: bytes, name: str) -> Pillow.Image:
    """A decoded image in RGB, turned as it says it should be. Raises InvalidRequest."""
    if len(data) > BYTES:
        raise InvalidRequest(f"{name} has {len(data):,} bytes; {BYTES:,} are taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes; they are looked at here
            picture = Pillow.open(io.BytesIO(data), formats=FORMATS)
            _check(picture, name)
            picture.load()
            return ImageOps.exif_transpose(picture).convert("RGB")
    except InvalidRequest:
        raise
    except Pillow.DecompressionBombError as error:  # its own limit is far above
        raise InvalidRequest(f"{name} has more than {PIXELS:,} pixels.") from error
    except UnidentifiedImageError as error:
        raise InvalidRequest(f"{name} is no PNG or JPEG image.") from error
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise InvalidRequest(f"{name} cannot be read.", cause=str(error)) from error


def _check(picture: Pillow.Image, name: str) -> None:
    """Before anything is decoded: a small file may say that it is huge."""
    width, height = picture.size
    if width * height > PIXELS:
        raise InvalidRequest(
            f"{name} has {width:,} x {height:,} pixels; {PIXELS:,} in all are taken."
        )
    if max(width, height) > RATIO * min(width, height):
        raise InvalidRequest(
            f"{name} has {width:,} x {height:,} pixels; one side may be {RATIO} times as long as "
            "the other."
        )
    if getattr(picture, "n_frames", 1) != 1:
        raise InvalidRequest(f"{name} has several frames; one is taken.")
