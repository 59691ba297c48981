"""Conversations on disk: names, branches, and what happens when something goes wrong."""

import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvrun.chat.conversation import Conversation, Message
from kvrun.chat.store import MIGRATIONS, Store, state_folder
from kvrun.errors import InvalidRequest, KvrunError, NotFound


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "deep" / "state" / "chat.db")


def talk(*texts: str) -> Conversation:
    conversation = Conversation("be kind")
    for i, text in enumerate(texts):
        conversation.add(("user", "assistant")[i % 2], text, tokens=i)
    return conversation


def test_a_conversation_comes_back_with_all_its_branches(store: Store) -> None:
    conversation = talk("q — ünï 雪", "a")
    conversation.again()
    conversation.add("assistant", "b", rate=1.5)
    store.save("tides", conversation, "tiny")
    back = store.load("tides")
    assert back.to_dict() == conversation.to_dict()
    assert [m.content for m in back.branch()] == ["q — ünï 雪", "b"]


def test_saving_again_replaces(store: Store) -> None:
    store.save("x", talk("q", "a", "q2", "a2"), "tiny")
    store.save("x", talk("other"), "big")
    assert [m.content for m in store.load("x").branch()] == ["other"]
    assert [(s.name, s.model, s.messages) for s in store.saved()] == [("x", "big", 1)]


def test_the_list_and_removal(store: Store) -> None:
    assert store.saved() == []
    store.save("a", talk("q"), "tiny")
    store.save("b", talk("q", "a"), "tiny")
    assert {(s.name, s.messages) for s in store.saved()} == {("a", 1), ("b", 2)}
    store.remove("a")
    assert [s.name for s in store.saved()] == ["b"]
    with pytest.raises(NotFound, match="'a'"):
        store.remove("a")


def test_an_unknown_name_says_which_there_are(store: Store) -> None:
    with pytest.raises(NotFound) as error:
        store.load("tidse")
    assert "none is saved" in error.value.hint
    store.save("tides", talk("q"), "tiny")
    with pytest.raises(NotFound) as error:
        store.load("tidse")
    assert "tides" in error.value.hint


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "\x1b[31m", "x" * 101])
def test_names_that_cannot_be_are_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be named"):
        store.save(name, talk("q"), "tiny")
    assert not store.path.exists()


class Interrupted(Conversation):
    """Breaks while it is being written."""

    def __iter__(self) -> Iterator[Message]:
        yield next(super().__iter__())
        raise KeyboardInterrupt


def test_a_save_that_breaks_off_changes_nothing(store: Store) -> None:
    store.save("x", talk("q", "a"), "tiny")
    broken = Interrupted()
    broken.add("user", "lost")
    with pytest.raises(KeyboardInterrupt):
        store.save("x", broken, "tiny")
    assert [m.content for m in store.load("x").branch()] == ["q", "a"]


def test_writers_wait_for_each_other(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: Store(store.path).save(f"n{i}", talk("q"), "m"), range(24)))
    assert len(store.saved()) == 24


def test_a_file_of_a_newer_kvrun_is_left_alone(store: Store) -> None:
    store.save("x", talk("q"), "tiny")
    with sqlite3.connect(store.path) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(KvrunError, match="newer kvrun") as error:
        store.saved()
    assert "upgrade" in error.value.hint


def test_an_older_file_is_migrated_and_keeps_what_it_has(store: Store) -> None:
    store.path.parent.mkdir(parents=True)
    with sqlite3.connect(store.path) as db:
        db.executescript(MIGRATIONS[0])
        db.execute("INSERT INTO conversations VALUES (1, 'old', 'm', 's', NULL, 't', 't')")
        db.execute("PRAGMA user_version = 1")
    db.close()
    assert [s.name for s in store.saved()] == ["old"]
    with sqlite3.connect(store.path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    db.close()


def test_a_file_that_is_no_database_is_named(store: Store) -> None:
    store.path.parent.mkdir(parents=True)
    store.path.write_bytes(b"this is not a database at all" * 100)
    with pytest.raises(KvrunError, match=r"chat\.db cannot be used"):
        store.load("x")
    assert store.path.read_bytes().startswith(b"this is not")


def test_only_its_owner_can_look_into_the_folder(store: Store) -> None:
    store.save("x", talk("q"), "tiny")
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


def test_the_state_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "kvrun"


def test_adapter_and_board_come_back(store: Store) -> None:
    store.save("x", talk("q"), "tiny", adapter="sql", board="b1")
    store.save("x", talk("q", "a"), "tiny", adapter="json", board="b2")
    assert [(s.adapter, s.board) for s in store.saved()] == [("json", "b2")]


def test_search_finds_words_in_any_case_and_shows_the_place(store: Store) -> None:
    store.save("tides", talk("Why do TIDES happen?", "The Moon pulls " + "x " * 80), "tiny")
    store.save("Straße", talk("something else"), "tiny")
    (found,) = store.search("moon pulls")
    assert found.name == "tides"
    assert found.found.startswith("…" if found.found[0] == "…" else "The Moon pulls")
    assert len(found.found) < 80
    assert [s.name for s in store.search("STRASSE")] == ["Straße"]  # by its name
    assert store.search("moon else") == []
    assert store.search("100%") == store.search("_") == []
    assert len(store.search("")) == 2


def test_a_store_of_the_first_version_is_brought_forward(store: Store) -> None:
    store.path.parent.mkdir(parents=True)
    with sqlite3.connect(store.path) as db:
        db.executescript(MIGRATIONS[0])
        db.execute("PRAGMA user_version = 1")
        db.execute("INSERT INTO conversations VALUES (1, 'old', 'm', '', NULL, 'then', 'then')")
    db.close()
    (saved,) = store.saved()
    assert (saved.name, saved.adapter, saved.board) == ("old", "", "")
