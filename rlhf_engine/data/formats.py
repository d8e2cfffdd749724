"""Records of rows in our formats and those of other tools (TRL, Alpaca, ShareGPT, HH-RLHF, OpenAI), by the names of columns.

A row is a mapping of column names to JSON values; null means that a column is absent. Each function returns a record, or None
for a row that is left out, and the columns that it did not read. docs/guides/data_formats.md lists the formats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_engine.data.records import (
    Comparison,
    Demonstration,
    Message,
    PretrainingText,
    Prompt,
    PromptRecord,
    parse_messages,
    parse_ranking,
)

Columns = Mapping[str, Any]
"""A row, without the columns that are null."""

_PROMPTS = ("prompt", "messages", "conversations", "instruction")
_RESPONSES = ("response", "completion", "output")
_ASSISTANT = "\n\nAssistant:"
"""Text before each response in a transcript of HH-RLHF."""


class _Part(NamedTuple):
    """A part of a record with the names of the columns that it was read from."""

    value: Any
    used: tuple[str, ...]


def demonstration(row: Columns, line: int) -> tuple[Demonstration | None, Columns]:
    """Return the demonstration of a row; None for a response that `label` marks as bad, as in KTO's format."""
    prompt, response = _prompt(row), _response(row)
    if prompt is None:
        raise ValueError(_missing(row, _PROMPTS))
    if response is None:
        prompt, response = _last_turn(prompt, row)
    used = {*prompt.used, *response.used}
    if isinstance(row.get("label"), bool) and "completion" in used:
        used.add("label")
        if not row["label"]:
            return None, _rest(row, used)
    return Demonstration(prompt.value, response.value, line=line), _rest(row, used)


def comparison(row: Columns, line: int) -> tuple[Comparison, Columns]:
    """Return the comparison of a row: a ranking of completions, or a pair with the columns chosen and rejected."""
    if "preferred_output" in row and "non_preferred_output" in row:
        return _openai_pair(row, line)
    if "chosen" in row and "rejected" in row and "completions" not in row:
        prompt, texts = _pair(row)
        # Equal texts carry no preference.
        ranks = (0, 0) if texts[0] == texts[1] else (0, 1)
        record = Comparison(prompt.value, texts, ranks, line=line)
        return record, _rest(row, {*prompt.used, "chosen", "rejected"})
    prompt = _prompt(row)
    if prompt is None:
        raise ValueError(_missing(row, _PROMPTS))
    if "completions" not in row and isinstance(row.get("label"), bool):
        raise ValueError(
            "label: got a judgment of one response (KTO's format), expected at least two responses to compare: "
            "completions with a ranking, or chosen and rejected"
        )
    for name in ("completions", "ranking"):
        if name not in row:
            raise ValueError(f"no field {name!r}, expected completions and ranking, or chosen and rejected")
    completions = row["completions"]
    if not isinstance(completions, list):
        raise ValueError(f"completions: got {type(completions).__name__}, expected a list of strings")
    if len(completions) < 2:
        raise ValueError(f"completions: got {len(completions)}, expected at least 2 to compare")
    ranks = parse_ranking(row["ranking"], len(completions))
    record = Comparison(prompt.value, tuple(completions), ranks, line=line)
    return record, _rest(row, {*prompt.used, "completions", "ranking"})


def _openai_pair(row: Columns, line: int) -> tuple[Comparison, Columns]:
    """Return the comparison of a row in OpenAI's format for preferences."""
    names = ("preferred_output", "non_preferred_output")
    texts = [_response({"completion": row[name]}, name) for name in names]
    better, worse = (part.value for part in texts if part is not None)
    ranks = (0, 0) if better == worse else (0, 1)
    return Comparison(_openai_input(row), (better, worse), ranks, line=line), _rest(row, {"input", *names})


def _openai_input(row: Columns) -> tuple[Message, ...]:
    given = row.get("input")
    if not isinstance(given, dict) or "messages" not in given:
        raise ValueError(f"input: got {given!r}, expected an object with messages")
    return parse_messages(given["messages"], "input.messages")


def prompt_record(row: Columns, line: int) -> tuple[PromptRecord, Columns]:
    """Return the prompt of a row, which may also be that of a demonstration or of a pair; the record has the other columns."""
    prompt = _prompt(row)
    if prompt is None and "chosen" in row and "rejected" in row:
        prompt = _pair(row)[0]
    if prompt is None and "preferred_output" in row:
        prompt = _Part(_openai_input(row), ("input",))
    if prompt is None:
        raise ValueError(_missing(row, _PROMPTS))
    user = row.get("user_id")
    rest = _rest(row, {*prompt.used, "user_id", "split"})
    record = PromptRecord(
        prompt.value, str(user) if type(user) is int else user, row.get("split", "train"), columns=dict(rest), line=line
    )
    return record, rest


def pretraining_text(row: Columns, line: int) -> tuple[PretrainingText, Columns]:
    """Return the document of a row with a column `text`."""
    if "text" not in row:
        raise ValueError(_missing(row, ("text",)))
    return PretrainingText(row["text"], line=line), _rest(row, {"text"})


def _rest(row: Columns, used: Collection[str]) -> Columns:
    return {name: value for name, value in row.items() if name not in used}


def _missing(row: Columns, names: Sequence[str]) -> str:
    """Return the message for a row with none of the columns `names`, the first of which belongs to our format."""
    first, *others = names
    instead = f", or one of {', '.join(map(repr, others))}" if others else ""
    return f"no field {first!r}{instead}; the fields are {', '.join(row) or 'all null'}"


# ---- prompts ----


def _prompt(row: Columns) -> _Part | None:
    """Return the prompt of a row, or None if it has no column for one."""
    for name in ("messages", "conversations"):
        if name in row:
            return _conversation(row, name)
    if "prompt" in row:
        given = row["prompt"]
        return _Part(parse_messages(given, "prompt") if isinstance(given, list) else given, ("prompt",))
    return _alpaca(row) if "instruction" in row else None


def _conversation(row: Columns, name: str) -> _Part:
    """Return the messages of a column; a column `prompt` next to it must repeat one of them."""
    messages, used = parse_messages(row[name], name), (name,)
    if "prompt" in row:
        if not _repeats(row["prompt"], messages):
            raise ValueError(f"the fields prompt and {name} exclude each other; remove one")
        used = (name, "prompt")
    if name == "conversations" and (system := row.get("system")):
        # ShareGPT's format has the system message in a separate column.
        return _Part((*parse_messages([{"role": "system", "content": system}], "system"), *messages), (*used, "system"))
    return _Part(messages, used)


def _repeats(prompt: object, messages: tuple[Message, ...]) -> bool:
    """Return whether a prompt is the text of one of `messages`, or their beginning."""
    if isinstance(prompt, list):
        first = parse_messages(prompt, "prompt")
        return first == messages[: len(first)]
    return isinstance(prompt, str) and prompt.strip() in [message.content.strip() for message in messages]


def _alpaca(row: Columns) -> _Part:
    """Return instruction and input as one text; with a system text or earlier turns (`history`), a conversation."""
    names = ("instruction", "input", "system", "history")
    used = tuple(name for name in names if name in row)
    instruction, context = row["instruction"], row.get("input", "")
    if not isinstance(instruction, str) or not isinstance(context, str):
        raise ValueError(f"instruction and input: got {instruction!r} and {context!r}, expected strings")
    text = "\n\n".join(part for part in (instruction, context) if part.strip())
    system, history = row.get("system"), row.get("history") or []
    if not system and not history:
        return _Part(text, used)
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError(f"history: got {history!r}, expected a list of pairs of a prompt and a response")
    turns = [("system", system)] if system else []
    turns += [turn for asked, answered in history for turn in (("user", asked), ("assistant", answered))]
    given = [{"role": role, "content": content} for role, content in [*turns, ("user", text)]]
    return _Part(parse_messages(given, "instruction"), used)


# ---- responses ----


def _response(row: Columns, place: str | None = None) -> _Part | None:
    """Return the response of a row, or None if it has no column for one; `place` is its column in errors."""
    name = next((name for name in _RESPONSES if name in row), None)
    if name is None:
        return None
    given = row[name]
    if isinstance(given, list):
        messages = parse_messages(given, place or name)
        if len(messages) != 1 or messages[0].role != "assistant":
            raise ValueError(f"{place or name}: got {len(messages)} messages, expected one message of the assistant")
        given = messages[0].content
    return _Part(given, (name,))


def _last_turn(prompt: _Part, row: Columns) -> tuple[_Part, _Part]:
    """Split a conversation into the prompt and the assistant's last message."""
    messages: Prompt = prompt.value
    if not isinstance(messages, tuple):
        raise ValueError(_missing(row, _RESPONSES))
    if messages[-1].role != "assistant":
        raise ValueError(
            f"{prompt.used[0]}: got {messages[-1].role!r} as the last role, expected 'assistant', as there is no response"
        )
    if not messages[-1].trained:
        raise ValueError(f"{prompt.used[0]}: the last message has weight 0, expected a response to train on; remove it")
    return _Part(messages[:-1], prompt.used), _Part(messages[-1].content, ())


def _pair(row: Columns) -> tuple[_Part, tuple[str, str]]:
    """Return the prompt of a pair, and the chosen and the rejected response."""
    # A data set for several uses also has one of the two whole conversations as messages.
    prompt = _prompt({"prompt": row["prompt"]} if "prompt" in row else row)
    heads, texts = zip(*(_ending(row[name], name, prompt is None) for name in ("chosen", "rejected")), strict=True)
    if heads[0] != heads[1]:
        raise ValueError(
            "chosen and rejected: they differ before their last response; expected the same prompt in both"
        )
    if heads[0] is None:
        if prompt is None:
            raise ValueError("no field 'prompt', and chosen and rejected are responses without one")
        return prompt, texts
    if prompt is None:
        return _Part(heads[0], ()), texts
    # The conversation is complete in chosen and rejected, and the prompt repeats a part of it.
    if prompt.value != heads[0] and not _repeats(row.get("prompt"), heads[0]):
        raise ValueError(
            "prompt: differs from the conversation in chosen and rejected; remove it, or correct one of them"
        )
    return _Part(heads[0], prompt.used), texts


def _ending(given: object, name: str, transcript: bool) -> tuple[Prompt | None, str]:
    """Return what precedes the last response of `given` (None: nothing) and that response.

    `given` is a response, messages that end in one or, if `transcript`, a text with turns in HH-RLHF's format.
    """
    if isinstance(given, dict):  # one message, as in the pairs of ShareGPT's format
        given = [given]
    if isinstance(given, list):
        messages = parse_messages(given, name)
        if messages[-1].role != "assistant":
            raise ValueError(f"{name}: got {messages[-1].role!r} as the last role, expected 'assistant'")
        return messages[:-1] or None, messages[-1].content
    if not isinstance(given, str):
        raise ValueError(f"{name}: got {given!r} ({type(given).__name__}), expected a text or a list of messages")
    if not transcript:
        return None, given
    head, mark, text = given.rpartition(_ASSISTANT)
    if not mark:
        raise ValueError(
            f"no field 'prompt'; without it, {name} must be a list of messages, or a text with turns that begin with "
            r"'\n\nHuman:' and '\n\nAssistant:'"
        )
    return head + mark, text.strip()
