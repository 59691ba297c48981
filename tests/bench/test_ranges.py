"""Lists and ranges of a command line."""

import pytest

from kvrun.bench.ranges import parse
from kvrun.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("512", [512]),
        ("512,1024", [512, 1024]),
        ("1-4", [1, 2, 3, 4]),
        ("1-64*2", [1, 2, 4, 8, 16, 32, 64]),
        ("1-70*2", [1, 2, 4, 8, 16, 32, 64]),
        ("0-40+16", [0, 16, 32]),
        ("8,1-3, 2", [8, 1, 2, 3]),
        ("0", [0]),
    ],
)
def test_lists_and_ranges(text: str, values: list[int]) -> None:
    assert parse("-p", text) == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "neither"),
        ("a", "neither"),
        ("1,", "neither"),
        ("-1", "neither"),
        ("1-", "neither"),
        ("1-8**2", "neither"),
        ("1.5", "neither"),
        ("²", "neither"),
        ("1" * 30, "neither"),
        ("8-1", "backwards"),
        ("1-8*1", "never arrives"),
        ("0-8*2", "never arrives"),
        ("1-8+0", "never arrives"),
        ("1-5000", "more than 1000"),
    ],
)
def test_what_is_none(text: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"(?s)-p.*{said}"):
        parse("-p", text)


def test_the_least_value() -> None:
    with pytest.raises(InvalidRequest, match="0 is below 1"):
        parse("-b", "1,0", least=1)
