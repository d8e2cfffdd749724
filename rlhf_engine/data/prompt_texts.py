"""Look-up of the text and the columns of a prompt by its token ids, on disk, so that memory does not grow with the prompts."""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections.abc import Sequence
from typing import Any

from rlhf_engine.data.records import PromptRecord, plain

PlainPrompt = str | list[dict[str, str]]
"""A prompt as `plain` returns it: its text, or the messages of a conversation with role and content."""


class PromptTexts:
    """Texts of prompts by token ids, with the `columns` of their records that a reward function reads.

    They are in a temporary database, which is deleted with this object or at the end of the process.
    """

    def __init__(self, columns: Sequence[str] = ()) -> None:
        self._columns = tuple(columns)
        # With an empty name SQLite creates a private temporary file.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute(
            "CREATE TABLE prompts (ids BLOB PRIMARY KEY, line INTEGER, prompt TEXT, columns TEXT) WITHOUT ROWID"
        )
        self._database.execute("BEGIN")

    def add(self, ids: Sequence[int], record: PromptRecord) -> None:
        """Store the text of `record` for the token ids `ids` of its prompt.

        Raises:
            ValueError: a prompt with a different text or different columns has the same ids, which can happen if prompts are
                truncated or repeated. The policy cannot distinguish them, and a reward function could receive the wrong ones.
        """
        key, prompt = _key(ids), json.dumps(plain(record.prompt))
        columns = {name: self._json(name, record.columns.get(name)) for name in self._columns}
        row = (key, record.line, prompt, json.dumps(columns))
        if self._database.execute("INSERT OR IGNORE INTO prompts VALUES (?, ?, ?, ?)", row).rowcount == 1:
            return
        query = "SELECT line, prompt, columns FROM prompts WHERE ids = ?"
        line, other, others = self._database.execute(query, (key,)).fetchone()
        if other != prompt:
            raise ValueError(
                f"prompt: has the same tokens as the prompt of line {line}, but a different text; reward.function needs "
                "different tokens for different texts, so remove one of the two or raise rollout.max_prompt_tokens"
            )
        known = json.loads(others)
        for name, value in columns.items():
            if known[name] != value:
                raise ValueError(
                    f"{name}: differs from that of line {line}, whose prompt is the same; reward.function needs one value per "
                    "prompt, so remove one of the two lines or the function's parameter"
                )

    def __call__(self, ids: Sequence[int]) -> PlainPrompt:
        """Return the prompt that was added with these ids."""
        return json.loads(self._found("prompt", ids))

    def columns(self, ids: Sequence[int]) -> dict[str, Any]:
        """Return the columns of the prompt that was added with these ids; a column that its record does not have is None."""
        return {name: json.loads(value) for name, value in json.loads(self._found("columns", ids)).items()}

    def _found(self, column: str, ids: Sequence[int]) -> str:
        return self._database.execute(f"SELECT {column} FROM prompts WHERE ids = ?", (_key(ids),)).fetchone()[0]

    def _json(self, name: str, value: Any) -> str:
        try:
            return json.dumps(value)
        except TypeError:
            raise ValueError(
                f"{name}: got {value!r} ({type(value).__name__}), expected a value that JSON can hold; convert it to text"
            ) from None


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
