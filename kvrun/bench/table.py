"""Rows of measurements as a table for people, and as Markdown, CSV, JSON and JSON lines."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvrun.errors import InvalidRequest

Row = dict[str, Any]

FORMATS = ("table", "md", "csv", "json", "jsonl")
NOTHING = "–"


class Column(NamedTuple):
    """A title, and what stands below it for a row."""

    title: str
    text: Callable[[Row], str]


def check_format(name: str) -> str:
    """`name`, or InvalidRequest when it is no format."""
    if name not in FORMATS:
        raise InvalidRequest(f"-o is '{name}'.", hint=f"one of: {', '.join(FORMATS)}")
    return name


def number(value: float | None, digits: int = 4) -> str:
    """So many digits that mean something, thousands separated, no exponent."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, digits)}f}"


def figure(title: str, key: str, digits: int = 4) -> Column:
    """A column of one number."""
    return Column(title, lambda row: number(row.get(key), digits))


def words(title: str, key: str) -> Column:
    """A column of names or counts."""
    return Column(title, lambda row: str(row[key]))


def between(title: str, middle: str, low: str, high: str) -> Column:
    """A median and the percentiles around it."""

    def text(row: Row) -> str:
        return f"{number(row[middle])} ({number(row[low], 3)} … {number(row[high], 3)})"

    return Column(title, text)


_LIMITS = (
    figure("bound ms", "bound_ms", 3),
    figure("% roofline", "roofline_percent", 3),
    figure("% datasheet", "datasheet_percent", 3),
)
MICRO = (
    words("test", "test"),
    words("batch", "batch_size"),
    Column("tok/s", lambda row: f"{number(row['avg_ts'])} ± {number(row['stddev_ts'], 2)}"),
    between("ms, median (p10 … p90)", "median_ms", "p10_ms", "p90_ms"),
    figure("GB/s", "gb_per_s", 3),
    figure("TFLOP/s", "tflop_per_s", 3),
    *_LIMITS,
)
LATENCY = (
    words("test", "test"),
    words("batch", "batch_size"),
    between("ms, median (p10 … p90)", "median_ms", "p10_ms", "p90_ms"),
    Column("p99 ms", lambda row: number(1e3 * row["percentiles"]["99"])),
    figure("output tok/s", "output_throughput"),
    *_LIMITS,
)
THROUGHPUT = (
    words("test", "test"),
    words("requests", "num_requests"),
    Column(
        "tokens in / out",
        lambda row: f"{row['total_input_tokens']:,} / {row['total_output_tokens']:,}",
    ),
    between("s, median (p10 … p90)", "elapsed_time", "p10_s", "p90_s"),
    figure("requests/s", "requests_per_second", 3),
    figure("output tok/s", "output_throughput"),
    figure("total tok/s", "tokens_per_second"),
    figure("batch", "mean_batch", 3),
    words("preempted", "preemptions"),
    *_LIMITS,
)
LORA = (
    words("test", "test"),
    words("batch", "batch_size"),
    words("popularity", "popularity"),
    words("adapters", "adapters"),
    between("ms, median (p10 … p90)", "median_ms", "p10_ms", "p90_ms"),
    figure("over base ms", "over_base_ms", 3),
    figure("% of base", "base_percent", 3),
    figure("bytes ms", "floor_ms", 3),
    figure("output tok/s", "output_throughput"),
)
RATES = (
    words("what", "name"),
    figure("best", "shown", 3),
    words("unit", "unit"),
    figure("% datasheet", "datasheet_percent", 3),
)
LOAD = (
    words("ms", "name"),
    figure("mean", "mean"),
    figure("p50", "median"),
    figure("p90", "p90"),
    figure("p99", "p99"),
    figure("most", "max"),
)


def text(rows: Sequence[Row], columns: Sequence[Column], form: str = "table") -> str:
    """A "table", or "md"; columns that say nothing in any row are left out."""
    cells = [[column.title, *(column.text(row) for row in rows)] for column in columns]
    cells = [column for column in cells if not rows or any(c != NOTHING for c in column[1:])]
    padded = []
    for place, column in enumerate(cells):
        width = max(map(len, column))
        # Names to the left, numbers to the right.
        padded.append([cell.rjust(width) if place else cell.ljust(width) for cell in column])
    lines = list(zip(*padded, strict=True))
    if form != "md":
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = "|".join("-" * (len(cell) + 1) + (":" if n else "-") for n, cell in enumerate(lines[0]))
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"|{rule}|", *body])


def data(rows: Sequence[Row], about: Row, form: str) -> str:
    """As "json": one object with `about` and `results`; "jsonl" and "csv": both in each row."""
    if form == "json":
        return json.dumps(_plain({"about": about, "results": list(rows)}), indent=1)
    flat = [_plain({**row, **about}) for row in rows]
    if form == "jsonl":
        return "\n".join(json.dumps(row) for row in flat)
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in flat)
    return out.getvalue().rstrip("\n")


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value


def _plain(value: Any) -> Any:
    """JSON knows neither infinity nor what is not a number: they become null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
