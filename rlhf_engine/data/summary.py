"""Check of all records of a data file, and counts of its content, for `rlhf data check`."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path

from rlhf_engine.data.loading import Reading, read_comparisons, read_demonstrations, read_prompts, read_texts
from rlhf_engine.data.recognise import PRETRAINING, check_format
from rlhf_engine.notices import notice


def summarise(kind: str, path: str | Path, *, strict: bool = False, form: str | None = None) -> dict[str, int]:
    """Check every record of a file of `kind` (demonstrations, comparisons, prompts or pretraining); return counts by name.

    `form` names the format of a file whose columns fit several. Log the columns that training ignores; if `strict`, they are
    errors.

    Raises:
        ValueError: an unknown kind or format; an invalid line or a user in two splits, named as `file:line`; no records.
    """
    if kind not in _SUMMARIES:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(_SUMMARIES)}")
    counts = _SUMMARIES[kind](Path(path), () if strict else None, form)
    if not counts["records"]:
        raise ValueError(f"{path}: contains no {kind}; give a file with at least one record")
    return counts


def _demonstrations(path: Path, allow: Collection[str] | None, form: str | None) -> dict[str, int]:
    reading = read_demonstrations(path, allow=allow, form=form)
    counts = {"records": sum(1 for _ in reading)}
    notice(*reading.notes())
    return counts


def _comparisons(path: Path, allow: Collection[str] | None, form: str | None) -> dict[str, int]:
    counts: Counter[str] = Counter(records=0)
    reading = read_comparisons(path, allow=allow, form=form)
    for record in reading:
        pairs = len(record.pairs())
        counts.update(records=1, completions=len(record.completions), pairs=pairs)
        counts["without pairs (all tied)"] += not pairs
        counts[f"with {len(record.completions)} completions"] += 1
    notice(*reading.notes())
    return dict(counts)


def _prompts(path: Path, allow: Collection[str] | None, form: str | None) -> dict[str, int]:
    counts: Counter[str] = Counter(records=0)
    # With an empty name SQLite uses a temporary file, so that memory does not grow with the users.
    with closing(sqlite3.connect("", isolation_level=None)) as users:
        users.execute("CREATE TABLE users (user_id TEXT PRIMARY KEY, split TEXT) WITHOUT ROWID")
        users.execute("BEGIN")
        reading = read_prompts(path, allow=allow, form=form)
        for record in reading:
            counts.update(["records", record.split])
            if record.user_id is None:
                counts["without user_id"] += 1
                continue
            users.execute("INSERT OR IGNORE INTO users VALUES (?, ?)", (record.user_id, record.split))
            query = users.execute("SELECT split FROM users WHERE user_id = ?", (record.user_id,))
            if (before := query.fetchone()[0]) != record.split:
                raise ValueError(
                    f"{path}:{record.line}: split: got {record.split!r} for user_id {record.user_id!r}, whose prompts above "
                    f"are in {before!r}; expected one split per user"
                )
        notice(*reading.notes(read=reading.columns))
        if reading.columns:
            notice(
                f"{path}: further columns, which only a reward.function or reward.url reads: {', '.join(reading.columns)}"
            )
        if counts["without user_id"]:
            notice(f"{path}: `rlhf data clean` does not limit prompts without a user_id, and splits them by prompt")
        return {**counts, "users": users.execute("SELECT COUNT(*) FROM users").fetchone()[0]}


def _pretraining(path: Path, allow: Collection[str] | None, form: str | None) -> dict[str, int]:
    check_format(PRETRAINING, form)
    counts: Counter[str] = Counter(records=0)
    texts = read_texts(path, allow=allow)
    for record in texts:
        counts.update(records=1, characters=len(record.text))
    if isinstance(texts, Reading):
        notice(*texts.notes())
    return dict(counts)


_SUMMARIES: dict[str, Callable[[Path, Collection[str] | None, str | None], dict[str, int]]] = {
    "demonstrations": _demonstrations,
    "comparisons": _comparisons,
    "prompts": _prompts,
    "pretraining": _pretraining,
}
