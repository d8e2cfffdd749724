"""Names of the data formats of other tools, and the recognition of a row's format by the names of its columns.

A row may have the columns of two formats, such as `instruction` and `output` next to `prompt` and `completion`. Which of them
is meant cannot be seen, so that this is an error until a format is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

DEMONSTRATIONS, COMPARISONS, PROMPTS, PRETRAINING = KINDS = ("demonstrations", "comparisons", "prompts", "pretraining")
OURS = "rlhf"
"""Name of our format of each kind."""

_TEXT = ("prompt", "messages")
_ALPACA = ("instruction", "input", "system", "history")
_SHAREGPT = ("conversations", "system")
_PAIR = ("chosen", "rejected")
_OPENAI = ("input", "preferred_output", "non_preferred_output")
_ANY_PROMPT = (*_TEXT, *_ALPACA, *_SHAREGPT)


class Format(NamedTuple):
    """A format of one kind of records."""

    title: str
    """Its name for people."""
    columns: tuple[str, ...]
    """Columns that it reads; those of the other formats of its kind are ignored in its rows."""
    fits: Callable[[frozenset[str]], bool]
    """Whether a row with these columns may be in this format."""


def _has(*names: str, without: tuple[str, ...] = ()) -> Callable[[frozenset[str]], bool]:
    return lambda columns: columns.issuperset(names) and columns.isdisjoint(without)


def _answers(response: str) -> Callable[[frozenset[str]], bool]:
    """Return whether a row has a prompt and the column `response`."""
    return lambda columns: response in columns and not columns.isdisjoint(_TEXT)


def _talks(name: str) -> Callable[[frozenset[str]], bool]:
    """Return whether the column `name` is a whole conversation and not the prompt of a response in a further column."""
    return lambda columns: name in columns and ("prompt" in columns or columns.isdisjoint(("response", "completion")))


FORMATS: dict[str, dict[str, Format]] = {
    DEMONSTRATIONS: {
        OURS: Format("prompt and response", (*_TEXT, "response"), _answers("response")),
        "prompt_completion": Format(
            "TRL, prompt and completion", (*_TEXT, "completion", "label"), _answers("completion")
        ),
        "messages": Format("TRL and OpenAI, messages", _TEXT, _talks("messages")),
        "alpaca": Format("Alpaca", (*_ALPACA, "output"), _has("instruction", "output")),
        "sharegpt": Format("ShareGPT", _SHAREGPT, _talks("conversations")),
    },
    COMPARISONS: {
        OURS: Format(
            "completions and ranking", (*_ANY_PROMPT, "completions", "ranking"), _has("completions", "ranking")
        ),
        "preference": Format("chosen and rejected, a ranking of two", (*_ANY_PROMPT, *_PAIR), _has(*_PAIR)),
        "openai_preference": Format("OpenAI, preferred_output, a ranking of two", _OPENAI, _has(*_OPENAI)),
    },
    PROMPTS: {
        OURS: Format("prompt", _TEXT, lambda columns: not columns.isdisjoint(_TEXT)),
        "alpaca": Format("Alpaca", _ALPACA, _has("instruction", without=_TEXT)),
        "sharegpt": Format("ShareGPT", _SHAREGPT, _has("conversations", without=_TEXT)),
        "preference": Format("chosen and rejected", (*_TEXT, *_PAIR), _has(*_PAIR, without=_ANY_PROMPT)),
        "openai_preference": Format("OpenAI, preferred_output", _OPENAI, _has(*_OPENAI, without=_TEXT)),
    },
    PRETRAINING: {OURS: Format("text", ("text",), _has("text"))},
}
"""Kind of records -> name of a format -> the format. docs/guides/data_formats.md describes each."""


def check_format(kind: str, name: str | None) -> None:
    """Raise ValueError unless `name` is a format of records of `kind`, or None."""
    if name is not None and name not in FORMATS[kind]:
        raise ValueError(f"--format: got {name!r} for {kind}, expected one of {', '.join(FORMATS[kind])}")


def in_format(kind: str, row: Mapping[str, Any], chosen: str | None = None) -> tuple[Mapping[str, Any], str | None]:
    """Return the row without the columns of other formats of `kind`, and the name of its format; None if it is none of them.

    Raises:
        ValueError: the columns fit two formats, and none is `chosen`.
    """
    name = chosen or _fitting(kind, frozenset(row))
    if name is None:
        return row, None
    hidden = _columns(kind) - set(FORMATS[kind][name].columns)
    return ({key: value for key, value in row.items() if key not in hidden} if hidden else row), name


def kind_of(columns: Collection[str], chosen: str | None = None) -> str:
    """Return the kind of records that a row with these columns has, for a file whose kind is not given.

    Raises:
        ValueError: the columns fit formats of two kinds, or none.
    """
    names = frozenset(columns)
    found = [
        (kind, name)
        for kind in (COMPARISONS, DEMONSTRATIONS)
        for name, one in FORMATS[kind].items()
        if (one.fits(names) if chosen is None else name == chosen and (name != OURS or one.fits(names)))
    ]
    kinds = {kind for kind, _ in found}
    if len(kinds) == 1:
        return kinds.pop()
    if kinds:
        choices = ", ".join(f"--format {name} ({kind})" for kind, name in found)
        raise ValueError(f"the columns fit two formats; choose one with {choices}")
    for kind in (PRETRAINING, PROMPTS):
        if any(one.fits(names) for one in FORMATS[kind].values()):
            return kind
    raise ValueError(
        f"the columns are those of no format: {', '.join(columns)}; docs/guides/data_formats.md lists them"
    )


@lru_cache(maxsize=256)
def _fitting(kind: str, columns: frozenset[str]) -> str | None:
    found = [name for name, one in FORMATS[kind].items() if one.fits(columns)]
    if len(found) > 1:
        choices = " or ".join(f"{name} ({FORMATS[kind][name].title})" for name in found)
        raise ValueError(
            f"the columns fit two formats, {choices}; choose one: rlhf data convert FILE NEW_FILE --format {found[0]}"
        )
    return found[0] if found else None


@cache
def _columns(kind: str) -> frozenset[str]:
    return frozenset(column for one in FORMATS[kind].values() for column in one.columns)
