"""Text to token ids and back: one place that knows the prompt's frame and where EOS goes."""

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
    """How many prompts a codec has cut so far, for the report."""

    count: int = 0


@dataclass(frozen=True)
class Codec:
    """A tokenizer together with how prompts are framed and how long things may be."""

    tokenizer: PreTrainedTokenizerBase
    """Any Hugging Face tokenizer with an EOS token."""
    prompt_template: str = "{prompt}\n"
    """Frame of a prompt; `{prompt}` stands for its text. Messages come in the tokenizer's chat template instead."""
    max_prompt_tokens: int = 512
    """Longest prompt, its frame included."""
    max_response_tokens: int = 256
    """Longest response, EOS included; a longer one is refused."""
    max_tokens: int | None = None
    """Longest prompt and response together, the positions of the model that reads them; None if it has no such limit."""
    long_prompts: Literal["refuse", "truncate"] = "refuse"
    """What happens to a longer prompt: an error, or it loses its beginning and is counted in `truncated`."""
    stop: tuple[str, ...] = ()
    """Texts that end a response and are no part of it."""
    truncated: Truncations = field(default_factory=Truncations, compare=False)
    """Counts the prompts that `encode_prompt` has cut."""

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: got one without an EOS token, expected one with")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected a text with {{prompt}} in it")
        bare, whole = self.encode_texts(["a"])[0], self.tokenizer("a")["input_ids"]
        behind = whole[whole.index(bare[-1]) + 1 :] if bare and bare[-1] in whole else []
        if behind:
            raise ValueError(
                f"tokenizer: got one that puts {self.tokenizer.decode(behind)!r} behind a prompt, expected none there: the "
                "answer goes on where the prompt ends (add_eos_token false, or another post-processor)"
            )

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a response."""
        return cast("int", self.tokenizer.eos_token_id)  # transformers types every special token alike

    @property
    def pad_id(self) -> int:
        """Id that fills rows; EOS where the tokenizer has no PAD, which is safe because masks are explicit."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else cast("int", pad)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Ids of the framed prompt, with the special tokens that the tokenizer puts in front of a text."""
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
        """`prompt` itself if `max_prompt_tokens` hold it in its frame, otherwise as much of its end as they hold."""

        def fits(part: Prompt) -> bool:
            return len(self._frame(part)) <= self.max_prompt_tokens

        if fits(prompt):
            return prompt
        rest = cut_left(prompt, fits)
        if rest is None:
            raise ValueError(
                f"prompt: got a frame that leaves it no room in max_prompt_tokens={self.max_prompt_tokens}"
            )
        return rest

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts alone: a special token that somebody wrote in one, such as `<|endoftext|>`, is text and ends nothing."""
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer takes for control tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple({*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)})

    def _special_in(self, text: str) -> str | None:
        return next((token for token in self.special_tokens if token in text), None)

    def _frame(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            # A frame may be made of special tokens; where it is, they cannot be told from those of the prompt.
            framed = self._special_in(self.prompt_template) is not None
            if framed and (found := self._special_in(prompt)):
                raise ValueError(f"prompt: got the special token {found} in it, expected none in a frame that has some")
            text = self.prompt_template.replace("{prompt}", prompt)
            return self.tokenizer(text, split_special_tokens=not framed)["input_ids"]
        for index, message in enumerate(prompt):
            if found := self._special_in(message.role) or self._special_in(message.content):
                raise ValueError(f"messages[{index}]: got the special token {found} in it, expected text")
        # The chat template writes the special tokens itself.
        return self.tokenizer(render(prompt, self.tokenizer), add_special_tokens=False)["input_ids"]

    def encode_response(self, response: str) -> list[int]:
        """Ids of the response and EOS."""
        ids = [*self.encode_texts([response])[0], self.eos_id]
        if len(ids) > self.max_response_tokens:
            raise ValueError(
                f"response: got {len(ids)} tokens, expected at most max_response_tokens={self.max_response_tokens}"
            )
        return ids

    def join(self, prompt: Sequence[int], response: str) -> Example:
        """An encoded prompt and a response to it."""
        example = Example(tuple(prompt), tuple(self.encode_response(response)))
        if self.max_tokens is not None and len(example) > self.max_tokens:
            raise ValueError(
                f"prompt and response: got {len(example)} tokens, expected at most {self.max_tokens}, the model's positions"
            )
        return example

    def example(self, demonstration: Demonstration) -> Example:
        """Ids of a demonstration."""
        return self.join(self.encode_prompt(demonstration.prompt), demonstration.response)

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of a sampled response, up to its first EOS or stop string."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        text = cast("str", self.tokenizer.decode(ids, skip_special_tokens=True))  # a list of texts for a batch only
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text.strip()


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with EOS and a PAD of its own, learnt from `texts`.

    Every byte has a token, so no text is unknown to it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(
            f"vocab_size: got {vocab_size}, expected at least {len(alphabet) + 2}, all bytes and two marks"
        )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def render(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation in the tokenizer's own frame, up to where the assistant's answer begins.

    Raises:
        ValueError: a tokenizer without a chat template, or a template that refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("messages: got a tokenizer without a chat template, expected one with, or a prompt")
    try:
        text = tokenizer.apply_chat_template(
            [asdict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(f"messages: the tokenizer's chat template refuses them: {error}") from None
    return cast("str", text)  # token ids with tokenize=True only


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
