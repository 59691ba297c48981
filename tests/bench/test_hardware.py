"""The ceilings of a machine: measured, kept, measured again when what was kept is unreadable."""

from pathlib import Path

import pytest

from kvrun.bench import cpu_rates, hardware
from kvrun.bench.hardware import Hardware
from kvrun.errors import InvalidRequest, Unsupported


def test_every_rate_a_limit_needs_is_there(measured: Hardware) -> None:
    assert {rate.unit for rate in measured.rates} == {"GB/s", "TFLOP/s"}
    assert all(rate.value > 0 for rate in measured.rates)
    for dtype in ("float32", "bfloat16", "float16"):
        at = measured.ceilings(dtype)
        assert at.bandwidth == max(r.value for r in measured.rates if r.unit == "GB/s")
        assert at.flops in [r.value for r in measured.rates if r.unit == "TFLOP/s"]
    assert measured.threads >= 1
    assert measured.device_name in measured.line("float32")


def test_what_was_measured_is_kept(measured: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rates, "measure", lambda *args, **kwargs: pytest.fail("measured again"))
    assert hardware.known("cpu") == measured


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rates": [], "date": ""}', '{"rates": [1]}'])
def test_unreadable_ones_are_measured_again(home: Path, measured: Hardware, text: str) -> None:
    [kept] = (home / "cache" / "kvrun" / "ceilings").iterdir()
    kept.write_text(text)
    seen: list[str] = []
    again = hardware.known("cpu", scale=0.002, watch=seen.append)
    assert [rate.name for rate in again.rates] == [rate.name for rate in measured.rates]
    assert len(seen) == len(again.rates)
    assert hardware.known("cpu") == again


def test_a_home_that_cannot_be_written_to(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert hardware.measured("cpu", quick=True, scale=0.002).rates


def test_devices_that_are_not_there() -> None:
    with pytest.raises(InvalidRequest, match="'gpu'"):
        hardware.here("gpu")
    with pytest.raises(Unsupported, match="sees no CUDA device"):
        hardware.here("cuda")
