"""Store: conversations by name in one SQLite file that survives a crash at any moment."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import platformdirs

from kvrun.chat.conversation import Conversation
from kvrun.errors import InvalidRequest, KvrunError, NotFound

# Migration i brings a file from user_version i to i + 1; those that shipped never change.
MIGRATIONS = (
    """
    CREATE TABLE conversations (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        model TEXT NOT NULL,
        system TEXT NOT NULL,
        head INTEGER,
        created TEXT NOT NULL,
        updated TEXT NOT NULL
    );
    CREATE TABLE messages (
        conversation INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
        id INTEGER NOT NULL,
        parent INTEGER,
        role TEXT NOT NULL,
        content TEXT NOT NULL,
        meta TEXT NOT NULL,
        PRIMARY KEY (conversation, id)
    );
    """,
    """
    ALTER TABLE conversations ADD COLUMN adapter TEXT NOT NULL DEFAULT '';
    ALTER TABLE conversations ADD COLUMN board TEXT NOT NULL DEFAULT '';
    """,
)
MAX_NAME = 100
SNIPPET = 60  # characters around what a search has found


@dataclass(frozen=True)
class Saved:
    """One row of the list: `updated` is ISO 8601 in UTC.

    Conversations that stood side by side on one screen share their `board`; `found` is the place
    that a search has hit.
    """

    name: str
    model: str
    messages: int
    updated: str
    adapter: str = ""
    board: str = ""
    found: str = ""


def state_folder() -> Path:
    """Where kvrun keeps what a user said: conversations and line history."""
    return platformdirs.user_state_path("kvrun", appauthor=False)


class Store:
    """Opened for each call and closed after it, so that no lock outlives a call."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or state_folder() / "conversations.db"

    def save(
        self,
        name: str,
        conversation: Conversation,
        model: str,
        *,
        adapter: str = "",
        board: str = "",
    ) -> None:
        """Keep a conversation under a name; what the name held before is replaced, in one step."""
        if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
            raise InvalidRequest(
                f"a conversation cannot be named {name!r}.",
                cause=f"a name has 1 to {MAX_NAME} printable characters",
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with self._open() as db:
            (number,) = db.execute(
                "INSERT INTO conversations"
                " (name, model, system, head, created, updated, adapter, board)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
                " model = excluded.model, system = excluded.system, head = excluded.head,"
                " updated = excluded.updated, adapter = excluded.adapter,"
                " board = excluded.board RETURNING id",
                (name, model, conversation.system, conversation.head, now, now, adapter, board),
            ).fetchone()
            db.execute("DELETE FROM messages WHERE conversation = ?", (number,))
            db.executemany(
                "INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (number, m.id, m.parent, m.role, m.content, json.dumps(dict(m.meta)))
                    for m in conversation
                ],
            )

    def load(self, name: str) -> Conversation:
        """The conversation of that name; NotFound says which there are."""
        with self._open() as db:
            row = db.execute(
                "SELECT id, system, head FROM conversations WHERE name = ?", (name,)
            ).fetchone()
            if row is None:
                known = [n for (n,) in db.execute("SELECT name FROM conversations ORDER BY name")]
                hint = f"saved: {', '.join(known[:20])}" if known else "none is saved yet"
                raise NotFound(f"no conversation is saved as '{name}'.", hint=hint)
            number, system, head = row
            messages = db.execute(
                "SELECT id, parent, role, content, meta FROM messages"
                " WHERE conversation = ? ORDER BY id",
                (number,),
            ).fetchall()
        keys = ("id", "parent", "role", "content", "meta")
        rows = [dict(zip(keys, (*m[:4], json.loads(m[4])), strict=True)) for m in messages]
        return Conversation.from_dict({"system": system, "head": head, "messages": rows})

    def saved(self) -> list[Saved]:
        """Everything saved, the latest first."""
        with self._open() as db:
            rows = db.execute(
                "SELECT name, model, (SELECT count(*) FROM messages WHERE conversation = c.id),"
                " updated, adapter, board FROM conversations c ORDER BY updated DESC, id"
            ).fetchall()
        return [Saved(*row) for row in rows]

    def search(self, text: str) -> list[Saved]:
        """Those whose name or one of whose messages holds every word of `text`, in any case."""
        words = text.casefold().split()
        everything = {s.name: s for s in self.saved()}
        if not words:
            return list(everything.values())
        holds = " AND ".join(["instr(fold(content), ?) > 0"] * len(words))
        with self._open() as db:
            db.create_function("fold", 1, str.casefold, deterministic=True)
            rows = db.execute(
                "SELECT name, content FROM messages m JOIN conversations c ON c.id = m.conversation"
                f" WHERE {holds} ORDER BY m.id DESC",
                words,
            ).fetchall()
        found = {name: _snippet(content, words[0]) for name, content in rows}
        return [
            replace(saved, found=found.get(name, ""))
            for name, saved in everything.items()
            if name in found or all(word in name.casefold() for word in words)
        ]

    def remove(self, name: str) -> None:
        """Forget a conversation; NotFound when there is none."""
        with self._open() as db:
            if not db.execute("DELETE FROM conversations WHERE name = ?", (name,)).rowcount:
                raise NotFound(f"no conversation is saved as '{name}'.")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection inside one transaction: all of it happens, or nothing."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with closing(sqlite3.connect(self.path, timeout=10, isolation_level=None)) as db:
                # Two that change it at once do not wait for each other; one of them is enough.
                with suppress(sqlite3.OperationalError):
                    db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA foreign_keys = ON")
                db.execute("BEGIN IMMEDIATE")
                try:
                    self._migrate(db)
                    yield db
                except BaseException:
                    db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise KvrunError(
                f"the store of conversations {self.path} cannot be used.",
                cause=str(error),
                hint="move the file away to start a new one, or check the disk",
            ) from error

    def _migrate(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise KvrunError(
                f"the store of conversations {self.path} was written by a newer kvrun.",
                cause=f"its version is {version}, this kvrun knows {len(MIGRATIONS)}",
                hint="pip install --upgrade kvrun",
            )
        for script in MIGRATIONS[version:]:
            # executescript would commit the transaction that is open.
            for statement in filter(str.strip, script.split(";")):
                db.execute(statement)
        if version < len(MIGRATIONS):
            db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _snippet(content: str, word: str) -> str:
    """The words around a place, on one line."""
    at = max(0, content.casefold().find(word) - SNIPPET // 3)
    text = " ".join(content[at : at + SNIPPET].split())
    return ("…" if at else "") + text + ("…" if at + SNIPPET < len(content) else "")
