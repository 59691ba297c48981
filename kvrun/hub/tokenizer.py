"""A tokenizer of another kind -> tokenizer.json: python -m kvrun.hub.tokenizer FOLDER OUT.

transformers converts it, in a process of its own; the code of a repository is never run.
"""

import sys
from pathlib import Path

from transformers import AutoTokenizer, dynamic_module_utils

from kvrun.hub.limits import confine, tell

MEMORY = 4 << 30
FILE = 1 << 28
# transformers would ask on the terminal whether to run a repository's code; 0 seconds: it does not.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
PACKAGES = ("sentencepiece", "tiktoken", "protobuf")


def main(folder: Path, out: Path) -> None:
    """Write OUT/tokenizer.json for the tokenizer in FOLDER. Raises what transformers raises."""
    confine(MEMORY, FILE)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if not tokenizer.is_fast:
        raise ValueError(f"transformers cannot convert a {type(tokenizer).__name__}")
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except Exception as error:  # transformers raises many kinds
        text = str(error)
        binary = [*Path(sys.argv[1]).glob("*.model"), *Path(sys.argv[1]).glob("*.tiktoken")]
        if binary and any(name in text.lower() for name in PACKAGES):
            tell(package=True)
        else:
            tell(refused=f"{type(error).__name__}: {' '.join(text.split())[:200]}")
        sys.exit(1)
