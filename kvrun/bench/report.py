"""Report: rows of figures to stdout in the format asked for, and charts of them."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrun.bench import plot, table
from kvrun.bench.plot import Bar
from kvrun.bench.table import Column, Row
from kvrun.errors import InvalidRequest, KvrunError

Bars = Callable[[Row], list[Bar]]


@dataclass(frozen=True)
class Kind:
    """How the rows of one command are shown: columns, and what is drawn of a row."""

    title: str
    columns: Sequence[Column]
    bars: Bars


@dataclass(frozen=True)
class Report:
    """Where figures go. Raises InvalidRequest, before anything is measured, for what cannot be."""

    form: str = "table"
    chart: bool | None = None  # None: when a person reads a table
    plot: str | None = None

    def __post_init__(self) -> None:
        table.check_format(self.form)
        if self.plot is not None:
            folder = Path(self.plot).absolute().parent
            if not folder.is_dir() or Path(self.plot).is_dir():
                raise InvalidRequest(f"--plot: {self.plot} cannot be written.")
            if Path(self.plot).suffix not in ("", ".svg"):
                raise InvalidRequest(f"--plot writes SVG; {self.plot} is called another thing.")

    def show(
        self,
        kind: Kind,
        rows: Sequence[Row],
        about: dict[str, Any],
        *,
        above: str = "",
        drawn: Sequence[Row] | None = None,
    ) -> None:
        """Print rows; `above` stands over a table, and `drawn` are others that the bars show."""
        if sys.stdout is None:
            raise KvrunError("standard output is closed.")
        bars = [bar for row in drawn or rows for bar in kind.bars(row)]
        if self.form in ("table", "md"):
            lines = [above] if above else []
            lines.append(table.text(rows, kind.columns, self.form))
            if self._draws and bars:
                lines += ["", plot.chart(kind.title, bars)]
            print("\n".join(lines), flush=True)
        else:
            print(table.data(rows, about, self.form), flush=True)
        if self.plot is not None:
            note = " · ".join(str(about[name]) for name in NOTED if about.get(name))
            plot.save(Path(self.plot), plot.svg(f"kvrun bench: {kind.title}", note, bars))

    @property
    def _draws(self) -> bool:
        if self.chart is None:
            return self.form == "table" and sys.stdout.isatty()
        return self.chart


# What stands below the title of a picture.
NOTED = ("model_id", "weights", "dtype", "device_name", "base_url", "date")


def _share(row: Row, label: str, value: float) -> list[Bar]:
    """A bar of the share of the roofline, or of the value itself where there are no limits."""
    percent = row.get("roofline_percent")
    return [Bar(label, value) if percent is None else Bar(label, percent, 100.0)]


def _micro(row: Row) -> list[Bar]:
    group = "pp" if row["n_prompt"] else "tg"
    label = f"{row['test']} b{row['batch_size']}"
    return [bar._replace(group=group) for bar in _share(row, label, row["avg_ts"])]


def _lora(row: Row) -> list[Bar]:
    label = f"{row['test']} b{row['batch_size']} {row['popularity']}"
    return [Bar(label, row["base_percent"], 100.0, group=row["test"])]


def _rates(row: Row) -> list[Bar]:
    return [Bar(f"{row['name']} ({row['unit']})", row["shown"])] if row["unit"] == "GB/s" else []


def _load(row: Row) -> list[Bar]:
    # The gaps between pieces are not drawn: their maximum dwarfs everything else.
    return [
        Bar(f"{name} {key}", row[f"{key}_{name}_ms"], group=name)
        for name in ("ttft", "tpot")
        for key in ("median", "p90", "p99")
        if math.isfinite(row[f"{key}_{name}_ms"])
    ]


LIMITED = "% of the roofline; tokens/s where no limits are known"
MICRO = Kind(LIMITED, table.MICRO, _micro)
LATENCY = Kind(
    "% of the roofline; output tokens/s where no limits are known",
    table.LATENCY,
    lambda row: _share(row, row["test"], row["output_throughput"]),
)
THROUGHPUT = Kind(
    LATENCY.title,
    table.THROUGHPUT,
    lambda row: _share(row, row["test"], row["output_throughput"]),
)
LORA = Kind("% of the base model's speed", table.LORA, _lora)
HARDWARE = Kind("GB/s", table.RATES, _rates)
LOAD = Kind("ms", table.LOAD, _load)
