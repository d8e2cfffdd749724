"""Check of all records of a data file, and counts of its content, for `rlhf data check`."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from rlhf_engine.data.loading import read_comparisons, read_demonstrations, read_prompts, read_texts


def summarise(kind: str, path: str | Path) -> dict[str, int]:
    """Check every record of a file of `kind` (demonstrations, comparisons, prompts or pretraining); return counts by name.

    Raises:
        ValueError: an unknown kind; an invalid line or a user in two splits, named as `file:line`; no records.
    """
    if kind not in _SUMMARIES:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(_SUMMARIES)}")
    counts = _SUMMARIES[kind](Path(path))
    if not counts["records"]:
        raise ValueError(f"{path}: contains no {kind}; give a file with at least one record")
    return counts


def _demonstrations(path: Path) -> dict[str, int]:
    return {"records": sum(1 for _ in read_demonstrations(path))}


def _comparisons(path: Path) -> dict[str, int]:
    counts: Counter[str] = Counter(records=0)
    for record in read_comparisons(path):
        pairs = len(record.pairs())
        counts.update(records=1, completions=len(record.completions), pairs=pairs)
        counts["without pairs (all tied)"] += not pairs
        counts[f"with {len(record.completions)} completions"] += 1
    return dict(counts)


def _prompts(path: Path) -> dict[str, int]:
    counts: Counter[str] = Counter(records=0)
    # With an empty name SQLite uses a temporary file, so that memory does not grow with the users.
    with closing(sqlite3.connect("", isolation_level=None)) as users:
        users.execute("CREATE TABLE users (user_id TEXT PRIMARY KEY, split TEXT) WITHOUT ROWID")
        users.execute("BEGIN")
        for record in read_prompts(path):
            counts.update(["records", record.split])
            users.execute("INSERT OR IGNORE INTO users VALUES (?, ?)", (record.user_id, record.split))
            query = users.execute("SELECT split FROM users WHERE user_id = ?", (record.user_id,))
            if (before := query.fetchone()[0]) != record.split:
                raise ValueError(
                    f"{path}:{record.line}: split: got {record.split!r} for user_id {record.user_id!r}, whose prompts above "
                    f"are in {before!r}; expected one split per user"
                )
        return {**counts, "users": users.execute("SELECT COUNT(*) FROM users").fetchone()[0]}


def _pretraining(path: Path) -> dict[str, int]:
    counts: Counter[str] = Counter(records=0)
    for record in read_texts(path):
        counts.update(records=1, characters=len(record.text))
    return dict(counts)


_SUMMARIES: dict[str, Callable[[Path], dict[str, int]]] = {
    "demonstrations": _demonstrations,
    "comparisons": _comparisons,
    "prompts": _prompts,
    "pretraining": _pretraining,
}
