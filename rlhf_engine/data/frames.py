"""Text at the beginning of many prompts, such as an instruction, which the search for duplicates leaves out.

A frame is the longest common beginning of at least `share` of all prompts, and of at least `_FEWEST`. Prompts that begin with
different frames, one after the other, are compared by what follows the last one.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from rlhf_engine.data.records import Prompt, prompt_texts

_FEWEST = 10
"""Fewest prompts of a frame: in a small file, a few prompts that begin alike are copies of one."""


def compared_text(prompt: Prompt) -> tuple[str, str]:
    """Return the system messages of a prompt and its other text, both normalized for the comparison of prompts.

    Normalization is NFKC, case folding and collapsing of white space.
    """
    if isinstance(prompt, str):
        return "", _normalized([prompt])
    system = [message.content for message in prompt if message.role == "system"]
    others = [message.content for message in prompt if message.role != "system"]
    return (_normalized(system), _normalized(others)) if others else ("", _normalized(prompt_texts(prompt)))


def shared_frames(prompts: Callable[[], Iterable[Prompt]], chars: int, share: float) -> list[str]:
    """Return the frames of more than `chars` characters; `prompts()` reads all prompts and is called two times per frame found.

    Memory holds 1 / `share` texts of `chars` characters.
    """
    found: list[str] = []

    def rests() -> Iterator[str]:
        return (without_frames(compared_text(prompt)[1], found)[1] for prompt in prompts())

    while new := _common_beginnings(rests, chars, share):
        found += new
    return found


def without_frames(text: str, frames: Sequence[str]) -> tuple[str, str]:
    """Return the frames with which `text` begins, joined, and the rest."""
    start, size = 0, -1
    while size != start:
        size = start
        start += max((len(frame) for frame in frames if text.startswith(frame, start)), default=0)
    return text[:start], text[start:]


def _normalized(texts: Sequence[str]) -> str:
    text = "\n".join(texts)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def _common_beginnings(texts: Callable[[], Iterable[str]], chars: int, share: float) -> list[str]:
    """Return the longest common beginning of each group of texts with equal first `chars` characters that is large enough."""
    candidates = _frequent((text[:chars] for text in texts()), math.ceil(1 / share))
    candidates = {start for start in candidates if len(start) == chars}
    if not candidates:
        return []
    count, seen, common = 0, Counter[str](), dict[str, str]()
    for text in texts():
        count += 1
        start = text[:chars]
        if start in candidates:
            seen[start] += 1
            common[start] = _common(common.get(start, text), text)
    return [common[start] for start, number in seen.items() if number >= max(_FEWEST, share * count)]


def _common(one: str, other: str) -> str:
    """Return the longest common beginning of two texts."""
    size = min(len(one), len(other))
    return one[: next((place for place in range(size) if one[place] != other[place]), size)]


def _frequent(keys: Iterable[str], count: int) -> set[str]:
    """Return at most `count` keys, among them all that are more than 1 / (`count` + 1) of `keys` (Misra and Gries 1982)."""
    counters: dict[str, int] = {}
    for key in keys:
        if key in counters or len(counters) < count:
            counters[key] = counters.get(key, 0) + 1
            continue
        counters = {other: number - 1 for other, number in counters.items() if number > 1}
    return set(counters)
