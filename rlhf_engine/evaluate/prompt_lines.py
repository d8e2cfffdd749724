"""Prompts in the lines of the files that evaluation writes: a text, or the messages of a conversation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rlhf_engine.data.records import Prompt, parse_messages


def plain(prompt: Prompt) -> str | list[dict[str, str]]:
    """What JSON, or a user's function, gets for a prompt: its text, or its messages with role and content."""
    return prompt if isinstance(prompt, str) else [asdict(message) for message in prompt]


def prompt_field(prompt: Prompt) -> dict[str, Any]:
    """The field of a line that holds a prompt, as the readers of data sets expect it."""
    return {"prompt" if isinstance(prompt, str) else "messages": plain(prompt)}


def prompt_of(line: dict[str, Any]) -> Prompt:
    """The prompt of a line that `prompt_field` wrote."""
    return line["prompt"] if "prompt" in line else parse_messages(line["messages"])
