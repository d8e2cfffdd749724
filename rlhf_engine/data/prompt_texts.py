"""What people typed, found again by the token ids that were made of it; on disk, as memory must not grow with the prompts."""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections.abc import Sequence

from rlhf_engine.data.records import PromptRecord, plain

PlainPrompt = str | list[dict[str, str]]
"""A prompt as `plain` gives it: its text, or a conversation's messages with role and content."""


class PromptTexts:
    """Prompts by their ids, in a temporary database that is gone with this object or the process."""

    def __init__(self) -> None:
        # An empty name is SQLite's for a file of its own that nobody else sees.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("CREATE TABLE prompts (ids BLOB PRIMARY KEY, line INTEGER, prompt TEXT) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, ids: Sequence[int], record: PromptRecord) -> None:
        """Remember what `record` asks in `ids`.

        Raises ValueError, naming the other's line, where a different prompt has the same ids, as prompts may have that were
        cut: the policy cannot tell them apart, and who is told of the one would judge an answer to the other.
        """
        key, prompt = _key(ids), json.dumps(plain(record.prompt))
        row = (key, record.line, prompt)
        if self._database.execute("INSERT OR IGNORE INTO prompts VALUES (?, ?, ?)", row).rowcount == 1:
            return
        line, other = self._database.execute("SELECT line, prompt FROM prompts WHERE ids = ?", (key,)).fetchone()
        if other != prompt:
            raise ValueError(
                f"prompt: got the tokens of line {line}, whose text is another, expected prompts that differ in their tokens "
                "where a reward.function reads their texts"
            )

    def __call__(self, ids: Sequence[int]) -> PlainPrompt:
        """The prompt that `add` was given with these ids."""
        found = self._database.execute("SELECT prompt FROM prompts WHERE ids = ?", (_key(ids),)).fetchone()
        return json.loads(found[0])


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
