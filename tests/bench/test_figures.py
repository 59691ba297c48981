"""Percentiles, tables in every format, charts."""

import csv
import io
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvrun.bench import plot, report, spread, table
from kvrun.bench.plot import Bar
from kvrun.errors import InvalidRequest, KvrunError

ROW = {
    "test": "tg8 @ d64", "batch_size": 2, "avg_ts": 1234.4, "stddev_ts": 6.7,
    "median_ms": 1.62, "p10_ms": 1.5, "p90_ms": 1.75, "gb_per_s": 12.3456, "tflop_per_s": math.nan,
    "bound_ms": 1.0, "roofline_percent": 61.7, "datasheet_percent": None, "samples_ms": [1.5, 1.7],
}  # fmt: skip


def test_percentiles() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert spread.median(values) == 2.5
    assert spread.percentile(values, 0) == 1
    assert spread.percentile(values, 100) == 4
    assert spread.percentile(values, 90) == pytest.approx(3.7)
    assert spread.mean(values) == 2.5
    assert spread.deviation(values) == pytest.approx(1.2909944)
    assert spread.deviation([5.0]) == 0
    assert all(math.isnan(f([])) for f in (spread.mean, spread.median, spread.deviation))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567.8, "1,234,568"), (1234.56, "1,235"), (12.3456, "12.35"), (0.012345, "0.0123"),
        (0.0, "0"), (-2.5, "-2.500"), (None, "–"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, shown: str) -> None:
    assert table.number(value) == shown


def test_a_table_lines_up_and_leaves_out_what_says_nothing() -> None:
    lines = table.text([ROW, ROW | {"batch_size": 128}], table.MICRO).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert "% roofline" in lines[0]
    assert "1,234 ± 6.7" in lines[1]
    assert "datasheet" not in lines[0]
    assert "TFLOP" not in lines[0]


def test_markdown() -> None:
    head, rule, body = table.text([ROW], table.MICRO, "md").splitlines()
    assert head.count("|") == rule.count("|") == body.count("|")
    assert set(rule) == set("|-:")
    assert [cell.strip() for cell in body.split("|")][1:3] == ["tg8 @ d64", "2"]


def test_json_csv_and_lines_hold_the_same() -> None:
    about = {"model_id": "m", "shape": {"hidden_size": 8}}
    whole = json.loads(table.data([ROW, ROW], about, "json"))
    assert whole["about"] == about
    assert whole["results"][1]["avg_ts"] == 1234.4
    assert whole["results"][0]["tflop_per_s"] is None  # JSON has no NaN
    lines = [json.loads(line) for line in table.data([ROW, ROW], about, "jsonl").splitlines()]
    assert lines == [whole["results"][0] | about] * 2
    rows = list(csv.DictReader(io.StringIO(table.data([ROW, ROW], about, "csv"))))
    assert len(rows) == 2
    assert rows[0]["test"] == "tg8 @ d64"
    assert json.loads(rows[0]["samples_ms"]) == [1.5, 1.7]
    assert json.loads(rows[0]["shape"]) == {"hidden_size": 8}


def test_a_chart_marks_the_limit() -> None:
    lines = plot.chart("title", [Bar("half", 50, 100), Bar("whole", 100, 100), Bar("x", 25)])
    title, half, whole, free = lines.splitlines()
    assert title == "title"
    assert half.index("│") == whole.index("│")
    assert half.count("█") == plot.WIDTH // 2
    assert "│" not in free
    assert plot.chart("nothing", []) == "nothing"


def test_an_svg_is_xml_with_a_bar_for_each() -> None:
    bars = [Bar("a <b> & c", 1, 2, "g"), Bar("d", 2, None, "h")]
    root = ElementTree.fromstring(plot.svg("t < u", "note", bars))
    space = "{http://www.w3.org/2000/svg}"
    ground, first, second = root.findall(f"{space}rect")
    assert float(second.get("width", 0)) == 2 * float(first.get("width", 0))
    assert first.get("fill") != second.get("fill")
    assert len(root.findall(f"{space}line")) == 1
    texts = [one.text for one in root.findall(f"{space}text")]
    assert {"t < u", "a <b> & c", "1.000 (50 %)"} <= set(texts)
    assert ground.get("width") == root.get("width")


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be written"):
        report.Report(plot=str(tmp_path / "none" / "x.svg"))
    with pytest.raises(InvalidRequest, match="-o is 'xml'"):
        report.Report("xml")
    with pytest.raises(KvrunError, match="cannot be written"):
        plot.save(tmp_path, "")


def test_the_formats_on_the_command_line_are_those_there_are() -> None:
    from kvrun.cli import _bench

    assert _bench.FORMATS == table.FORMATS
