"""Look-up of the text of a prompt by its token ids, on disk, so that memory does not grow with the number of prompts."""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections.abc import Sequence

from rlhf_engine.data.records import PromptRecord, plain

PlainPrompt = str | list[dict[str, str]]
"""A prompt as `plain` returns it: its text, or the messages of a conversation with role and content."""


class PromptTexts:
    """Texts of prompts by token ids, in a temporary database that is deleted with this object or at the end of the process."""

    def __init__(self) -> None:
        # With an empty name SQLite creates a private temporary file.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("CREATE TABLE prompts (ids BLOB PRIMARY KEY, line INTEGER, prompt TEXT) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, ids: Sequence[int], record: PromptRecord) -> None:
        """Store the text of `record` for the token ids `ids` of its prompt.

        Raises:
            ValueError: a prompt with a different text has the same ids, which can happen if prompts are truncated. The policy
                cannot distinguish them, and a reward function could receive the wrong text.
        """
        key, prompt = _key(ids), json.dumps(plain(record.prompt))
        row = (key, record.line, prompt)
        if self._database.execute("INSERT OR IGNORE INTO prompts VALUES (?, ?, ?)", row).rowcount == 1:
            return
        line, other = self._database.execute("SELECT line, prompt FROM prompts WHERE ids = ?", (key,)).fetchone()
        if other != prompt:
            raise ValueError(
                f"prompt: has the same tokens as the prompt of line {line}, but a different text; reward.function needs "
                "different tokens for different texts, so remove one of the two or raise rollout.max_prompt_tokens"
            )

    def __call__(self, ids: Sequence[int]) -> PlainPrompt:
        """Return the prompt that was added with these ids."""
        found = self._database.execute("SELECT prompt FROM prompts WHERE ids = ?", (_key(ids),)).fetchone()
        return json.loads(found[0])


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
