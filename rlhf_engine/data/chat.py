"""Conversations as text: the tokenizer's chat template with its arguments, the end of a turn, and truncation.

The engine never edits a template's output. A template sees the arguments of `data.chat_template_kwargs` and a fixed date, so
that the text of a conversation is the same in every update, after a restart and on the next day.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any, cast

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_engine.data.records import Message, Prompt
from rlhf_engine.data.special_tokens import first_of, special_tokens
from rlhf_engine.errors import foreign_errors

READS_DATE = "strftime_now"
"""Function with which a chat template asks for the current date."""

_DIRECTIVES = tuple(f"%{letter}" for letter in "aAbBcdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZ") + tuple(
    f"%-{letter}" for letter in "deHIjmMSUVWy"
)
"""Directives of a date format."""
_PROBE = "PROBE"
"""Content of a message with which a template's surrounding text is found."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with fixed arguments and a fixed date."""

    tokenizer: PreTrainedTokenizerBase
    arguments: Mapping[str, object] = field(default_factory=dict)
    """Variables of the template, such as `enable_thinking`."""
    today: str = field(default_factory=lambda: date.today().isoformat())
    """Date that the template sees, as YYYY-MM-DD."""

    @property
    def source(self) -> str:
        """The Jinja source; empty if the tokenizer has no template."""
        source = getattr(self.tokenizer, "chat_template", None) or ""
        return source if isinstance(source, str) else "\n".join(source.values())

    def check_arguments(self) -> None:
        """Raise ValueError for an argument that the template does not read."""
        for name in self.arguments:
            if not self.source:
                raise ValueError(f"{name} is set, but the tokenizer has no chat template; remove it")
            if not self.reads(name):
                raise ValueError(f"the tokenizer's chat template does not read {name!r}; remove it or correct its name")

    def reads(self, name: str) -> bool:
        """Return whether the template's source contains the variable `name`."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def render(self, messages: tuple[Message, ...], *, respond: bool = True) -> str:
        """Return the conversation as text, with `respond` up to the start of the assistant's next response.

        Raises:
            ValueError: the tokenizer has no chat template, or the template rejects these messages.
        """
        if not self.source:
            raise ValueError(
                "messages: the tokenizer has no chat template; set one and save the tokenizer (tokenizer.chat_template = ...; "
                "tokenizer.save_pretrained(folder)), or give text prompts instead of messages"
            )
        arguments: dict[str, Any] = dict(self.arguments)
        if self.reads(READS_DATE):
            found = self.tokenizer.get_chat_template(tools=arguments.get("tools"))
            arguments["chat_template"] = _fixed_date(date.fromisoformat(self.today)) + found
        with foreign_errors("messages: the tokenizer's chat template rejects them"):
            text = self.tokenizer.apply_chat_template(
                [message.plain() for message in messages], tokenize=False, add_generation_prompt=respond, **arguments
            )
        return cast("str", text)  # it returns token ids only with tokenize=True

    @cached_property
    def frame_tokens(self) -> frozenset[str]:
        """Texts of the special tokens that the template writes around a user's and an assistant's message."""
        text = self._probe()
        return frozenset(token for token in special_tokens(self.tokenizer) if token in text)

    @cached_property
    def turn_end(self) -> tuple[str, str] | None:
        """Text between the content of an assistant's message and the special token that ends it, and that token.

        None if the template writes none, or if other text than white space is before it.
        """
        _, found, tail = self._probe().rpartition(_PROBE)
        place = first_of(self.frame_tokens, tail) if found else None
        if place is None or tail[: place[0]].strip():
            return None
        return tail[: place[0]], place[1]

    def _probe(self) -> str:
        if not self.source:
            return ""
        try:
            return self.render((Message("user", "question"), Message("assistant", _PROBE)), respond=False)
        except ValueError:  # the template accepts only conversations of a different form
            return ""


def _fixed_date(today: date) -> str:
    """Return the start of a template: a macro in place of transformers' function, which formats the current date."""
    known = (directive for directive in _DIRECTIVES if today.strftime(directive) != directive)
    replaced = "".join(f" | replace({directive!r}, {today.strftime(directive)!r})" for directive in known)
    return f"{{% macro {READS_DATE}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"


def cut_left(prompt: Prompt, fits: Callable[[Prompt], bool]) -> Prompt | None:
    """Return the longest end of `prompt` for which `fits` is true, or None if no text is left.

    In a conversation, system messages at the start are kept, and the oldest turns are removed as a whole, so that the rest
    begins with a user's message. If the turn of the last user's message does not fit either, the text of that message is cut.
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
    # Bisection over characters works with every tokenizer. It may cut a token in two, and it assumes that a shorter text does
    # not have more tokens, which is nearly always true. The returned text was checked to fit.
    low, high = 1, len(text)
    while low < high:
        middle = (low + high) // 2
        if fits(text[middle:]):
            high = middle
        else:
            low = middle + 1
    return text[high:] if text[high:].strip() else None
