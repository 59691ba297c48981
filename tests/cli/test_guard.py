"""Every way a command can fail, as message and exit code."""

import pytest
import typer

from kvrun.cli._guard import guarded
from kvrun.errors import (
    BadCheckpoint,
    EngineDead,
    InvalidRequest,
    KvrunError,
    MissingExtra,
    NotFound,
    Unsupported,
)


def outcome(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        guarded(command)()
    captured = capsys.readouterr()
    assert captured.out == ""
    return end.value.exit_code, captured.err


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (KvrunError, 1),
        (BadCheckpoint, 1),
        (InvalidRequest, 2),
        (NotFound, 3),
        (Unsupported, 4),
        (EngineDead, 70),
    ],
)
def test_expected_failures_are_three_lines(
    kind: type[KvrunError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    error = kind("it broke.", cause="a \x1b[31mreason", hint="do this")
    said = "error: it broke.\ncause: a [31mreason\nhint: do this\n"
    assert outcome(error, capsys) == (code, said)


def test_a_missing_extra_names_the_way_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = outcome(MissingExtra("this needs flashinfer.", "flashinfer"), capsys)
    assert code == 4
    assert "pip install 'kvrun[cuda]'" in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (PermissionError(13, "Permission denied", "/a/b"), 1, "error: Permission denied: /a/b\n"),
    ],
)
def test_the_systems_failures(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(error, capsys) == (code, said)


def test_the_unexpected_shows_its_trace_only_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVRUN_DEBUG", raising=False)
    code, said = outcome(ZeroDivisionError("oh"), capsys)
    assert code == 1
    assert said.startswith("error: ZeroDivisionError: oh\nhint: KVRUN_DEBUG=1")
    assert "Traceback" not in said
    monkeypatch.setenv("KVRUN_DEBUG", "1")
    assert "Traceback" in outcome(ZeroDivisionError("oh"), capsys)[1]


def test_a_result_and_typers_own_exits_pass() -> None:
    assert guarded(lambda: 7)() == 7

    def leave() -> None:
        raise typer.Exit(5)

    with pytest.raises(typer.Exit) as end:
        guarded(leave)()
    assert end.value.exit_code == 5
