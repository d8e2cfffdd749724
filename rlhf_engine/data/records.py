"""Records of demonstrations, rankings, prompts and pretraining text, which are checked on construction."""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {value!r} ({type(value).__name__}), expected a string")
    if not value.strip():
        raise ValueError(f"{name}: got an empty string, expected some text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: got {value[error.start]!r}, half of a surrogate pair, expected text") from None


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that is too large for a float
        return False


def _shown(value: object) -> str:
    return (
        f"an integer of {value.bit_length()} bits"
        if isinstance(value, int) and value.bit_length() > 64
        else repr(value)
    )


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """Speaker: user, assistant, system, or a different role that the tokenizer's chat template supports."""
    content: str
    """Text of the message."""
    trained: bool = True
    """Whether SFT trains it, if it is the assistant's; false for `weight` 0 in OpenAI's format."""

    def plain(self) -> dict[str, str]:
        """Return the message as a dictionary with role and content."""
        return {"role": self.role, "content": self.content}


Prompt = str | tuple[Message, ...]
"""A text, or a conversation whose next turn is the assistant's."""


def text_of(prompt: Prompt) -> str:
    """Return `prompt`, which must be a text and not a conversation."""
    assert isinstance(prompt, str)
    return prompt


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, tuple):
        _check_text("prompt", prompt)
    elif not prompt or prompt[-1].role == "assistant":
        raise ValueError("messages: there is no message to respond to; the last one must not be the assistant's")


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response that a labeler wrote for it."""

    prompt: Prompt
    """What the user typed."""
    response: str
    """Response of the labeler."""
    line: int = field(default=0, compare=False, kw_only=True)
    """Line of the file that it came from; 0 if none."""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_text("response", self.response)


@dataclass(frozen=True)
class Comparison:
    """A prompt, K completions and one labeler's ranking of them, possibly with ties."""

    prompt: Prompt
    """What the user typed."""
    completions: tuple[str, ...]
    """K >= 2 responses."""
    ranks: tuple[float, ...]
    """One finite number per completion: lower is better, equal numbers are a tie."""
    line: int = field(default=0, compare=False, kw_only=True)
    """Line of the file that it came from; 0 if none."""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if len(self.completions) < 2:
            raise ValueError(f"completions: got {len(self.completions)}, expected at least 2 to compare")
        for index, completion in enumerate(self.completions):
            _check_text(f"completions[{index}]", completion)
        if len(self.ranks) != len(self.completions):
            raise ValueError(
                f"ranking: got {len(self.ranks)} ranks, expected {len(self.completions)}, one per completion"
            )
        for index, rank in enumerate(self.ranks):
            if isinstance(rank, bool) or not isinstance(rank, int | float) or not _is_finite(rank):
                raise ValueError(f"ranking[{index}]: got {_shown(rank)}, expected a finite number")
        first: dict[str, int] = {}
        for index, completion in enumerate(self.completions):
            other = first.setdefault(completion, index)
            if self.ranks[other] != self.ranks[index]:
                raise ValueError(
                    f"ranking[{index}]: got {self.ranks[index]!r} for the text of completion {other}, whose rank is "
                    f"{self.ranks[other]!r}, expected equal ranks for equal completions"
                )

    def pairs(self) -> list[tuple[int, int]]:
        """Return all index pairs (better, worse) of completions that are not tied."""
        count = len(self.ranks)
        return [(i, j) for i in range(count) for j in range(count) if self.ranks[i] < self.ranks[j]]


def check_split(split: object) -> None:
    """Raise ValueError if `split` is not the name of a split."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train', 'validation' or 'test'")


@dataclass(frozen=True)
class PromptRecord:
    """A prompt, with the id and the split of its user."""

    prompt: Prompt
    """What the user typed."""
    user_id: str | None = None
    """Id of the user who typed it; None if it is not known."""
    split: str = "train"
    """train, validation or test; all prompts of a user are in the same one."""
    columns: dict[str, Any] = field(default_factory=dict, hash=False, kw_only=True)
    """Further columns of the row, such as a reference answer, for a reward function that takes them as arguments."""
    line: int = field(default=0, compare=False, kw_only=True)
    """Line of the file that it came from; 0 if none."""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if self.user_id is not None:
            _check_text("user_id", self.user_id)
        check_split(self.split)


@dataclass(frozen=True)
class PretrainingText:
    """A document of pretraining text."""

    text: str
    """The document."""
    line: int = field(default=0, compare=False, kw_only=True)
    """First line of the document in its file; 0 if none."""

    def __post_init__(self) -> None:
        _check_text("text", self.text)


_SHAREGPT_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant")}
"""Roles of a chat template for the speakers in ShareGPT's format; other speakers keep their name."""


def _message(item: object, name: str) -> Message:
    """Return the message of an object with role and content; `name` is its place in errors."""
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        raise ValueError(f"{name}: got {item!r}, expected an object with role and content")
    further = next((key for key in item if key not in ("role", "content", "weight")), None)
    if further is not None:
        raise ValueError(f"{name}: has the further field {further!r}; remove it")
    _check_text(f"{name}.role", item["role"])
    if item["role"] == "system" and isinstance(item["content"], str) and not item["content"].strip():
        raise ValueError(f"{name}.content: got an empty string, expected some text; remove the message")
    _check_text(f"{name}.content", item["content"])
    weight = item.get("weight", 1)
    if weight not in (0, 1) or (weight == 0 and item["role"] != "assistant"):
        raise ValueError(
            f"{name}.weight: got {weight!r}, expected 1, or 0 for a message of the assistant that is not trained"
        )
    return Message(item["role"], item["content"], bool(weight))


def parse_messages(given: object, column: str = "messages") -> tuple[Message, ...]:
    """Parse a list such as `[{"role": "user", "content": "Hi"}]`, or ShareGPT's `[{"from": "human", "value": "Hi"}]`.

    Raises:
        ValueError: an invalid message, named by `column` and its index.
    """
    if not isinstance(given, list) or not given:
        raise ValueError(f"{column}: got {given!r}, expected a list of objects with role and content")
    messages = []
    for index, item in enumerate(given):
        name = f"{column}[{index}]"
        # In a data set on disk, every message has the fields of all messages; absent fields are null.
        item = {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item
        if isinstance(item, dict) and set(item) == {"from", "value"} and isinstance(item["from"], str):
            item = {"role": _SHAREGPT_ROLES.get(item["from"], item["from"]), "content": item["value"]}
        messages.append(_message(item, name))
    return tuple(messages)


def prompt_texts(prompt: Prompt) -> list[str]:
    """Return the texts in `prompt` that people may have typed: the prompt, or the content of every message."""
    return [prompt] if isinstance(prompt, str) else [message.content for message in prompt]


def with_texts(prompt: Prompt, texts: Sequence[str]) -> Prompt:
    """Return `prompt` with the texts that `prompt_texts` returns replaced by `texts`."""
    if isinstance(prompt, str):
        return texts[0]
    return tuple(replace(message, content=text) for message, text in zip(prompt, texts, strict=True))


def plain(prompt: Prompt) -> str | list[dict[str, str]]:
    """Return a prompt for JSON or a user's function: its text, or its messages as dictionaries with role and content."""
    return prompt if isinstance(prompt, str) else [message.plain() for message in prompt]


def prompt_field(prompt: Prompt) -> dict[str, Any]:
    """Return the field of a JSONL line that holds a prompt: `prompt` for a text, `messages` for a conversation."""
    return {"prompt" if isinstance(prompt, str) else "messages": plain(prompt)}


def prompt_of(line: dict[str, Any]) -> Prompt:
    """Return the prompt of a line with a field that `prompt_field` returned."""
    return line["prompt"] if "prompt" in line else parse_messages(line["messages"])


def parse_ranking(ranking: object, count: int) -> tuple[float, ...]:
    """Return ranks of `count` completions (0 is best) from "D > C > A = B"; letters are in the order of the completions.

    A list of numbers, one per completion with lower as better, is returned as a tuple.

    Raises:
        ValueError: a letter is unknown, missing or repeated, or the value has a wrong type.
    """
    if isinstance(ranking, Sequence) and not isinstance(ranking, str):
        return tuple(ranking)
    if not isinstance(ranking, str):
        raise ValueError(f"ranking: got {ranking!r}, expected a string such as 'D > C > A = B' or a list of numbers")
    if count > len(string.ascii_uppercase):
        raise ValueError(
            f"ranking: letters name at most {len(string.ascii_uppercase)} completions; give a list of ranks"
        )
    letters = tuple(string.ascii_uppercase[:count])
    ranks: dict[str, float] = {}
    for rank, group in enumerate(ranking.split(">")):
        for letter in (part.strip() for part in group.split("=")):
            if letter not in letters:
                raise ValueError(f"ranking: got {letter!r} in {ranking!r}, expected one of {', '.join(letters)}")
            if letter in ranks:
                raise ValueError(f"ranking: got {letter} twice in {ranking!r}, expected every completion once")
            ranks[letter] = rank
    missing = [letter for letter in letters if letter not in ranks]
    if missing:
        raise ValueError(f"ranking: {', '.join(missing)} not in {ranking!r}; rank every completion")
    return tuple(ranks[letter] for letter in letters)
