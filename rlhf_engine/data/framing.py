"""Prompts and how much of them the model reads: conversations in the tokenizer's frame, long prompts cut on the left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_engine.data.records import Message, Prompt


def render(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation in the tokenizer's own frame, up to where the assistant's answer begins.

    Raises:
        ValueError: a tokenizer without a chat template, or a template that refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("messages: got a tokenizer without a chat template, expected one with, or a prompt")
    try:
        return tokenizer.apply_chat_template(
            [asdict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(f"messages: the tokenizer's chat template refuses them: {error}") from None


def cut_left(prompt: Prompt, fits: Callable[[Prompt], bool]) -> Prompt | None:
    """The longest end of `prompt` that `fits`; None if no text is left of it.

    Of a conversation the system's words stay and the oldest turns go first, whole, so that it still begins with a user's;
    only the last turn is cut in its text.
    """
    if isinstance(prompt, str):
        return _cut_text(prompt, fits)
    system = next((i for i, message in enumerate(prompt) if message.role != "system"), len(prompt) - 1)
    head, turns = prompt[:system], prompt[system:]
    starts = [i for i, message in enumerate(turns) if message.role == "user"] or [0]
    for start in starts:
        if fits(head + turns[start:]):
            return head + turns[start:]
    first, *others = turns[starts[-1] :]

    def with_content(text: str) -> tuple[Message, ...]:
        return (*head, replace(first, content=text), *others)

    text = _cut_text(first.content, lambda text: fits(with_content(text)))
    return None if text is None else with_content(text)


def _cut_text(text: str, fits: Callable[[str], bool]) -> str | None:
    # By bisection over characters, which every tokenizer allows: a token may be cut in two, and a shorter text is
    # hardly ever more tokens. Whatever is returned was seen to fit.
    low, high = 1, len(text)
    while low < high:
        middle = (low + high) // 2
        if fits(text[middle:]):
            high = middle
        else:
            low = middle + 1
    return text[high:] if text[high:].strip() else None
