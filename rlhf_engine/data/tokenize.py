"""Text to token ids and back. Every stage converts with one `Codec`, so that all of them have the same special tokens.

* BOS, or what else the tokenizer prepends, is at the start of every prompt and of every document, once.
* A response ends with EOS, or in a conversation with the token that ends a turn in the chat template (`turn_end`).
* Special tokens in the text of a prompt or a document are plain text; if the template writes special tokens too, they are
  an error, because the tokenizer cannot distinguish the two.
* Special tokens in a response are the tokens, such as a `<think>` that the policy sampled, except BOS, EOS and PAD. With
  `keep_special_tokens=False` a response's text has no special tokens.
* White space is kept exactly, and a decoded text is not cleaned up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Literal, cast

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_engine.data.batching import Example
from rlhf_engine.data.chat import ChatTemplate, cut_left
from rlhf_engine.data.records import Demonstration, Message, Prompt
from rlhf_engine.data.special_tokens import exact_text, first_of, silent_ids, special_tokens, token_id, token_ids

EOS, PAD = "<|endoftext|>", "<|pad|>"


@dataclass
class Truncations:
    """Numbers of texts that a codec has changed."""

    count: int = 0
    """Prompts that it has truncated."""
    inexact: int = 0
    """Responses whose ids decode to a different text, for example because the tokenizer normalizes it."""


@dataclass(frozen=True)
class Codec:
    """A tokenizer with the prompt template and the limits on lengths."""

    tokenizer: PreTrainedTokenizerBase
    """A Hugging Face tokenizer with an EOS token."""
    prompt_template: str = "{prompt}\n"
    """Text around a prompt; `{prompt}` is replaced with its text. Messages use the tokenizer's chat template
    instead."""
    max_prompt_tokens: int = 512
    """Maximum tokens of a prompt with its template."""
    max_response_tokens: int = 256
    """Maximum tokens of a response with EOS; a longer response is an error."""
    max_tokens: int | None = None
    """Maximum tokens of a prompt with its response, the positions of the model; None if the model has no limit."""
    long_prompts: Literal["refuse", "truncate"] = "refuse"
    """Handling of a longer prompt: refuse raises an error, truncate cuts its beginning and counts it in `truncated`."""
    stop: tuple[str, ...] = ()
    """Texts that end a response; they are not part of its text. The text of a special token means the token."""
    truncated: Truncations = field(default_factory=Truncations, compare=False)
    """Numbers of truncated prompts, and of responses that the tokenizer changes."""
    keep_special_tokens: bool = True
    """Whether the text of a response has its special tokens, except BOS, EOS and PAD; otherwise it has none."""
    template_arguments: Mapping[str, object] = field(default_factory=dict)
    """Variables of the chat template, such as `enable_thinking`."""
    today: str = field(default_factory=lambda: date.today().isoformat())
    """Date that a chat template sees, as YYYY-MM-DD."""
    ends: set[int] = field(default_factory=set, compare=False)
    """Ids that end a sampled response, set by the sampler; if empty, EOS and the end of a turn do."""
    prefix: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Ids that the tokenizer prepends to a text, such as BOS."""

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: there is no EOS token; set eos_token")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected a text that contains {{prompt}}")
        bare, whole = self.encode_texts(["a"])[0], token_ids(self.tokenizer, ["a"])[0]
        places = (at for at in range(len(whole)) if bare and whole[at : at + len(bare)] == bare)
        start = next(places, None if bare else len(whole))
        appended = [] if start is None else whole[start + len(bare) :]
        if appended:
            raise ValueError(
                f"tokenizer: it appends {self.tokenizer.decode(appended)!r} to a prompt, but a response must follow the prompt "
                "directly; set add_eos_token to false or change the post-processor"
            )
        object.__setattr__(self, "prefix", tuple(whole[:start] if start else ()))

    # ---- special tokens ----

    @property
    def eos_id(self) -> int:
        """The id of the tokenizer's EOS."""
        return cast("int", self.tokenizer.eos_token_id)  # transformers declares the same type for all special tokens

    @property
    def pad_id(self) -> int:
        """The id of padding; EOS if the tokenizer has no PAD, which is safe because masks are explicit."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else cast("int", pad)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The tokenizer's chat template with its arguments."""
        return ChatTemplate(self.tokenizer, self.template_arguments, self.today)

    @cached_property
    def turn_end(self) -> tuple[int, ...]:
        """Ids that end an assistant's turn in the chat template; EOS if the template ends a turn with no special token."""
        found = self.chat.turn_end
        if found is None:
            return (self.eos_id,)
        return (*(self.encode_texts([found[0]])[0] if found[0] else ()), token_id(self.tokenizer, found[1]))

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a sampled response."""
        return frozenset(self.ends or (self.eos_id, self.turn_end[-1]))

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of the tokenizer's special tokens."""
        return special_tokens(self.tokenizer)

    @property
    def _kept(self) -> frozenset[str]:
        """Special tokens that the text of a response can have: not BOS, EOS and PAD, and no token that ends it."""
        ends = self.end_ids | self._stop_ids | self._dropped
        return frozenset(token for token, number in self._special_ids.items() if number not in ends)

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {token: token_id(self.tokenizer, token) for token in self.special_tokens}

    @cached_property
    def _dropped(self) -> frozenset[int]:
        """Ids that the text of a response does not have."""
        every = () if self.keep_special_tokens else self._special_ids.values()
        return silent_ids(self.tokenizer) | frozenset(every)

    def _special_in(self, text: str) -> str | None:
        found = first_of(frozenset(self.special_tokens), text)
        return None if found is None else found[1]

    # ---- text to ids ----

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids of the prompt in its template, with the special tokens that the tokenizer prepends.

        Raises:
            ValueError: the prompt is too long, or contains a special token that the template or conversation does not allow.
        """
        return self._fitted(prompt)[1]

    def _fitted(self, prompt: Prompt) -> tuple[Prompt, list[int]]:
        """Return the prompt, truncated if it must be, with its ids."""
        ids = self._frame(prompt)
        if len(ids) > self.max_prompt_tokens and self.long_prompts == "truncate":
            prompt = self.fit_prompt(prompt)
            ids = self._frame(prompt)
            self.truncated.count += 1
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt: got {len(ids)} tokens, expected at most max_prompt_tokens={self.max_prompt_tokens}"
            )
        return prompt, ids

    def fit_prompt(self, prompt: Prompt) -> Prompt:
        """Return `prompt` if it fits into `max_prompt_tokens` with its template, otherwise the longest end of it that fits.

        Raises:
            ValueError: the template leaves no tokens for the prompt.
        """

        def fits(part: Prompt) -> bool:
            return len(self._frame(part)) <= self.max_prompt_tokens

        if fits(prompt):
            return prompt
        rest = cut_left(prompt, fits)
        if rest is None:
            raise ValueError(
                f"prompt: the template leaves no tokens for it in max_prompt_tokens={self.max_prompt_tokens}; raise the limit"
            )
        return rest

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts without added tokens; a special token in a text, such as `<|endoftext|>`, is plain text."""
        return token_ids(self.tokenizer, texts, add_special_tokens=False, split_special_tokens=True)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of documents, each with the tokens that the tokenizer prepends, such as BOS, and with EOS."""
        return [[*self.prefix, *ids, self.eos_id] for ids in self.encode_texts(texts)]

    def _frame(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            # The tokenizer cannot distinguish special tokens of the template from special tokens in the prompt.
            framed = self._special_in(self.prompt_template) is not None
            if framed and (found := self._special_in(prompt)):
                raise ValueError(
                    f"prompt: contains the special token {found}; remove it, because prompt_template has special tokens too"
                )
            text = self.prompt_template.replace("{prompt}", prompt)
            ids = token_ids(self.tokenizer, [text], add_special_tokens=False, split_special_tokens=not framed)[0]
            # A template may begin with BOS, as those of model cards do.
            return ids if tuple(ids[: len(self.prefix)]) == self.prefix else [*self.prefix, *ids]
        for index, message in enumerate(prompt):
            if found := self._refused_in(message):
                raise ValueError(f"messages[{index}]: contains the special token {found}; remove it")
        # The chat template contains the special tokens.
        return token_ids(self.tokenizer, [self.chat.render(prompt)], add_special_tokens=False)[0]

    def _refused_in(self, message: Message) -> str | None:
        """Return a special token that may not be in a message; an assistant's may have those that responses keep."""
        allowed = self._kept - self.chat.frame_tokens if message.role == "assistant" else frozenset()
        refused = frozenset(self.special_tokens) - allowed
        return self._special_in(message.role) or (first_of(refused, message.content) or (0, None))[1]

    def encode_content(self, text: str) -> list[int]:
        """Return the ids of the text of a response, without an end: the inverse of `decode`."""
        kept = self._kept
        if first_of(kept, text) is None:
            return self.encode_texts([text])[0]
        whole = token_ids(self.tokenizer, [text], add_special_tokens=False, split_special_tokens=False)[0]
        # A token with lstrip or rstrip deletes white space, and BOS, EOS, PAD or an end in the text would become tokens.
        exact = self.content(whole) == whole and self.decode(whole) == text
        return whole if exact else self._encode_pieces(text, kept)

    def _encode_pieces(self, text: str, kept: frozenset[str]) -> list[int]:
        """Return the ids of the text, cut at the special tokens `kept`."""
        names = sorted(kept, key=len, reverse=True)
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, names))})", text):
            if piece:
                ids += [token_id(self.tokenizer, piece)] if piece in kept else self.encode_texts([piece])[0]
        return ids

    def encode_response(self, response: str, end: Sequence[int] | None = None) -> list[int]:
        """Return the ids of the response and its `end`, by default EOS.

        Raises:
            ValueError: the response is too long.
        """
        content = self.encode_content(response)
        self.truncated.inexact += self.decode(content) != response
        ids = [*content, *((self.eos_id,) if end is None else end)]
        if len(ids) > self.max_response_tokens:
            raise ValueError(
                f"response: got {len(ids)} tokens, expected at most max_response_tokens={self.max_response_tokens}"
            )
        return ids

    def join(self, prompt: Sequence[int], response: str) -> Example:
        """Encode a response and return it with its encoded prompt, as a reward model reads it: with EOS at its end.

        Raises:
            ValueError: the response, or both together, are too long.
        """
        return self._checked(Example(tuple(prompt), tuple(self.encode_response(response))))

    def _checked(self, example: Example) -> Example:
        if self.max_tokens is not None and len(example) > self.max_tokens:
            raise ValueError(
                f"prompt and response: got {len(example)} tokens, expected at most {self.max_tokens}, the model's positions"
            )
        return example

    # ---- demonstrations ----

    def example(self, demonstration: Demonstration) -> Example:
        """Return the ids of a demonstration; in a conversation the response ends as the chat template ends a turn."""
        prompt = self.encode_prompt(demonstration.prompt)
        return self._checked(Example(tuple(prompt), tuple(self._turn(demonstration.prompt, demonstration.response))))

    def _turn(self, prompt: Prompt, response: str) -> list[int]:
        return self.encode_response(response, None if isinstance(prompt, str) else self.turn_end)

    def examples(self, demonstration: Demonstration) -> list[Example]:
        """Return a demonstration in rows in which every turn of the assistant is trained, once, unless its weight is 0.

        A turn is in the row of the turn before it if the ids of that row are the beginning of its prompt. Otherwise, as in a
        template that deletes earlier reasoning, it starts a new row. In each row, every turn thus follows the ids that
        sampling would have as its prompt.
        """
        prompt = demonstration.prompt
        if isinstance(prompt, str) or not any(message.role == "assistant" for message in prompt):
            return [self.example(demonstration)]
        fitted, _ = self._fitted(prompt)
        turns = (*cast("tuple[Message, ...]", fitted), Message("assistant", demonstration.response))
        rows: list[_Row] = []
        for index, message in enumerate(turns):
            before = turns[:index]
            if message.role != "assistant" or not message.trained or not before or before[-1].role == "assistant":
                continue
            ids, response = self._frame(before), self._turn(before, message.content)
            if not rows or ids[: len(rows[-1].ids)] != rows[-1].ids:
                rows.append(_Row(len(ids)))
            rows[-1].add(ids, response)
        origin = rows[0].ids[: rows[0].prompt]
        return [self._checked(row.example(origin if number else [])) for number, row in enumerate(rows)]

    # ---- ids to text ----

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids that the policy sampled, without the special tokens that a response's text does not have."""
        return exact_text(self.tokenizer, ids, self._dropped)

    def decode_prompt(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt's ids, with its template and all special tokens."""
        return exact_text(self.tokenizer, ids)

    def decode_response(self, ids: Sequence[int]) -> str:
        """Return the text of a sampled response, up to the first id that ends it or the first stop text."""
        text = self.decode(self.content(ids))
        for stop in self.stop:
            if stop not in self.special_tokens:
                text = text.partition(stop)[0]
        return text

    def content(self, ids: Sequence[int]) -> list[int]:
        """Return the ids of a sampled response before the first one that ends it."""
        ids, ends = list(ids), self.end_ids | self._stop_ids
        return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]

    @cached_property
    def _stop_ids(self) -> frozenset[int]:
        return frozenset(token_id(self.tokenizer, stop) for stop in self.stop if stop in self.special_tokens)

    def text_differs(self, ids: Sequence[int]) -> bool:
        """Return whether the text of a sampled response has other ids than the response, so that a reward reads other tokens.

        Different ids can spell the same text, and a response may end in the middle of a character.
        """
        content = self.content(ids)
        return self.encode_content(self.decode(content)) != content


class _Row:
    """Turns of one conversation in one row of ids."""

    def __init__(self, prompt: int) -> None:
        self.prompt, self.ids = prompt, list[int]()
        self.context: list[tuple[int, int]] = []

    def add(self, prompt: list[int], response: list[int]) -> None:
        """Append the rest of a turn's prompt, and its response."""
        if self.ids:
            self.context.append((len(self.ids) - self.prompt, len(prompt) - self.prompt))
        self.ids = [*prompt, *response]

    def example(self, origin: list[int]) -> Example:
        """Return the row."""
        prompt, response = tuple(self.ids[: self.prompt]), tuple(self.ids[self.prompt :])
        return Example(prompt, response, tuple(self.context), tuple(origin))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with EOS and a separate PAD on `texts`.

    Every byte has a token, so that every text can be encoded.

    Raises:
        ValueError: `vocab_size` is too small for all bytes and the two special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(
            f"vocab_size: got {vocab_size}, expected at least {len(alphabet) + 2}, one token per byte and two special tokens"
        )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
