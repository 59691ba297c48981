"""What was asked before: the line editor's own file, read and written."""

from pathlib import Path

from prompt_toolkit.history import FileHistory

from kvrun.chat.history import History


def test_it_reads_what_the_line_editor_wrote_and_the_other_way_round(tmp_path: Path) -> None:
    path = tmp_path / "history"
    FileHistory(str(path)).store_string("one\ntwo")
    history = History(path)
    assert history.entries == ["one\ntwo"]
    history.add("+three")
    history.add("+three")
    assert list(FileHistory(str(path)).load_history_strings()) == ["+three", "one\ntwo"]
    assert History(path).entries == ["one\ntwo", "+three"]


def test_a_place_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = History(tmp_path / "file" / "history")
    history.add("x")
    assert history.entries == ["x"]
    assert History(None).entries == []
