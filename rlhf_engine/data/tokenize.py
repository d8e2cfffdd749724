"""Text to token ids and back: the prompt template, EOS, special tokens and truncation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Literal, cast

from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_engine.data.batching import Example
from rlhf_engine.data.records import Demonstration, Message, Prompt

EOS, PAD = "<|endoftext|>", "<|pad|>"


@dataclass
class Truncations:
    """Number of prompts that a codec has truncated."""

    count: int = 0


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
    """Texts that end a response; they are not part of its text."""
    truncated: Truncations = field(default_factory=Truncations, compare=False)
    """Number of prompts that `encode_prompt` has truncated."""

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: there is no EOS token; set eos_token")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected a text that contains {{prompt}}")
        bare, whole = self.encode_texts(["a"])[0], self.tokenizer("a")["input_ids"]
        behind = whole[whole.index(bare[-1]) + 1 :] if bare and bare[-1] in whole else []
        if behind:
            raise ValueError(
                f"tokenizer: it appends {self.tokenizer.decode(behind)!r} to a prompt, but a response must follow the prompt "
                "directly; set add_eos_token to false or change the post-processor"
            )

    @property
    def eos_id(self) -> int:
        """The id of the token that ends a response."""
        return cast("int", self.tokenizer.eos_token_id)  # transformers declares the same type for all special tokens

    @property
    def pad_id(self) -> int:
        """The id of padding; EOS if the tokenizer has no PAD, which is safe because masks are explicit."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else cast("int", pad)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids of the prompt in its template, with the special tokens that the tokenizer prepends.

        Raises:
            ValueError: the prompt is too long, or contains a special token that the template or conversation does not allow.
        """
        ids = self._frame(prompt)
        if len(ids) > self.max_prompt_tokens and self.long_prompts == "truncate":
            ids = self._frame(self.fit_prompt(prompt))
            self.truncated.count += 1
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt: got {len(ids)} tokens, expected at most max_prompt_tokens={self.max_prompt_tokens}"
            )
        return ids

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
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of the tokenizer's special tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple({*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)})

    def _special_in(self, text: str) -> str | None:
        return next((token for token in self.special_tokens if token in text), None)

    def _frame(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            # The tokenizer cannot distinguish special tokens of the template from special tokens in the prompt.
            framed = self._special_in(self.prompt_template) is not None
            if framed and (found := self._special_in(prompt)):
                raise ValueError(
                    f"prompt: contains the special token {found}; remove it, because prompt_template has special tokens too"
                )
            text = self.prompt_template.replace("{prompt}", prompt)
            return self.tokenizer(text, split_special_tokens=not framed)["input_ids"]
        for index, message in enumerate(prompt):
            if found := self._special_in(message.role) or self._special_in(message.content):
                raise ValueError(f"messages[{index}]: contains the special token {found}; remove it")
        # The chat template contains the special tokens.
        return self.tokenizer(render(prompt, self.tokenizer), add_special_tokens=False)["input_ids"]

    def encode_response(self, response: str) -> list[int]:
        """Return the ids of the response and EOS.

        Raises:
            ValueError: the response is too long.
        """
        ids = [*self.encode_texts([response])[0], self.eos_id]
        if len(ids) > self.max_response_tokens:
            raise ValueError(
                f"response: got {len(ids)} tokens, expected at most max_response_tokens={self.max_response_tokens}"
            )
        return ids

    def join(self, prompt: Sequence[int], response: str) -> Example:
        """Encode a response and return it with its encoded prompt.

        Raises:
            ValueError: the response, or both together, are too long.
        """
        example = Example(tuple(prompt), tuple(self.encode_response(response)))
        if self.max_tokens is not None and len(example) > self.max_tokens:
            raise ValueError(
                f"prompt and response: got {len(example)} tokens, expected at most {self.max_tokens}, the model's positions"
            )
        return example

    def example(self, demonstration: Demonstration) -> Example:
        """Return the ids of a demonstration."""
        return self.join(self.encode_prompt(demonstration.prompt), demonstration.response)

    def decode_response(self, ids: Sequence[int]) -> str:
        """Return the text of a sampled response, up to its first EOS or stop text."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        # `decode` returns a list only for a batch.
        text = cast("str", self.tokenizer.decode(ids, skip_special_tokens=True))
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text.strip()


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


def render(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the conversation in the tokenizer's chat template, up to the start of the assistant's response.

    Raises:
        ValueError: the tokenizer has no chat template, or the template rejects these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("messages: the tokenizer has no chat template; set one, or give a prompt instead of messages")
    try:
        text = tokenizer.apply_chat_template(
            [asdict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(f"messages: the tokenizer's chat template rejects them: {error}") from None
    return cast("str", text)  # it returns token ids only with tokenize=True


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
