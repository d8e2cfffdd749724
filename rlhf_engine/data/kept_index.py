"""What has been kept so far, on disk: memory stays the same however many prompts and users there are."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Self

_CACHE_KIB = 64 * 1024


class KeptIndex:
    """A set of keys and a count for each user, in a file that exists only while the index is open.

    Up to about 2,000,000 prompts it fits the cache of 64 MiB; from there on the disk sets the pace.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        # Nothing in it outlives the run, so nothing is journalled or synced.
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE keys (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("CREATE TABLE users (user_id TEXT PRIMARY KEY, kept INTEGER) WITHOUT ROWID")
        self._cursor = self._database.cursor()
        self._cursor.execute("BEGIN")

    def add_key(self, key: bytes) -> bool:
        """Keep `key`; False if it was there already."""
        return self._cursor.execute("INSERT OR IGNORE INTO keys VALUES (?)", (key,)).rowcount == 1

    def add_prompt(self, user_id: str, limit: int) -> bool:
        """Count one more prompt of a user; False, and not counted, if there are `limit` already."""
        statement = "INSERT INTO users VALUES (?, 1) ON CONFLICT DO UPDATE SET kept = kept + 1 WHERE kept < ?"
        return self._cursor.execute(statement, (user_id, limit)).rowcount == 1

    def users(self) -> int:
        """How many users have been counted."""
        return self._cursor.execute("SELECT COUNT(*) FROM users").fetchone()[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._path.unlink()
