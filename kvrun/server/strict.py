"""Strict JSON: what some parser down the line would trip over is refused at the door."""

import json
import math
import re
from typing import Any

from kvrun.server.errors import ApiError

MAX_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check(body: bytes) -> None:
    """Raise ApiError (malformed) for a body that is not strict JSON in UTF-8.

    Refused beyond the grammar: NaN and infinities, numbers too large for a double or of more than
    4,300 digits, halves of surrogate pairs, nesting deeper than 64.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _malformed(f"it is nested deeper than {MAX_DEPTH}") from None
    except ValueError:  # Python's own limit on the digits of an integer
        raise _malformed("a number has too many digits") from None
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _malformed(f"it is nested deeper than {MAX_DEPTH}")
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _malformed("a text holds half of a surrogate pair") from None


def _malformed(why: str) -> ApiError:
    return ApiError("malformed", f"The body is no JSON that can be read: {why}.")


def _refuse(name: str) -> None:
    raise _malformed(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _malformed("a number is too large")
    return value


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        depth += bool([v for v in level if isinstance(v, dict | list)])
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.values()
            elif isinstance(one, list):
                below += one
        level = [v for v in below if isinstance(v, dict | list)]
    return depth
