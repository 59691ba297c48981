"""The text that a model is calibrated with, and the text that it is checked with, as prompts."""

from pathlib import Path

from kvrun.errors import InvalidRequest, NotFound
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.text import Text

BUILTIN = Path(__file__).with_name("text.txt")
_LEAST = 64  # tokens, below which there is nothing to learn
_CHECKED = 5  # one prompt of so many is kept for the check


def prompts(
    folder: Path, source: str, count: int, length: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(to calibrate with, to check with): up to `count` prompts each, of up to `length` tokens.

    `source` is a file of plain text or "builtin". Raises NotFound and InvalidRequest.
    """
    path = BUILTIN if source == "builtin" else Path(source)
    try:
        written = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFound(
            f"there is no file {path}.", hint="--calibration FILE, or builtin"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} is not a text file.", cause=str(error)) from error
    text = Text.open(folder)
    if text is None:
        raise InvalidRequest(f"{folder} has no tokenizer.json.", hint="pull the model again")
    ids = text.encode(written)
    if len(ids) < _LEAST * _CHECKED:
        raise InvalidRequest(
            f"{path} has {len(ids)} tokens; at least {_LEAST * _CHECKED} are needed.",
            hint="give more text",
        )
    longest = HFConfig.read(folder).integer("max_position_embeddings", length)
    size = min(length, longest, len(ids) // _CHECKED)
    parts = [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
    kept = parts[_CHECKED - 1 :: _CHECKED]
    rest = [part for i, part in enumerate(parts) if i % _CHECKED != _CHECKED - 1]
    return rest[:count], kept[:count]
