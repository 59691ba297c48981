"""Standard input as a prompt."""

import sys

from kvrun.errors import InvalidRequest

MOST = 32 * 2**20  # bytes; longer than any model reads


def read_stdin() -> str:
    """All of standard input as text; '' when it is closed. Raises InvalidRequest if it is none."""
    if sys.stdin is None:
        return ""
    try:
        data = sys.stdin.buffer.read(MOST + 1)
    except OSError as error:
        raise InvalidRequest(
            "standard input cannot be read.", cause=error.strerror or str(error)
        ) from error
    if len(data) > MOST:
        raise InvalidRequest(
            f"standard input is longer than {MOST // 2**20} MiB.", hint="send the part that matters"
        )
    if b"\0" in data:
        raise InvalidRequest(
            "standard input is not text.",
            cause=f"byte {data.index(0)} is 0, as in a binary file or UTF-16",
            hint="for UTF-16: iconv -f UTF-16 -t UTF-8 FILE | kvrun chat …",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            "standard input is not UTF-8 text.",
            cause=f"byte {error.start} is 0x{data[error.start]:02x}",
            hint="iconv -f ISO-8859-1 -t UTF-8 FILE | kvrun chat …",
        ) from error
