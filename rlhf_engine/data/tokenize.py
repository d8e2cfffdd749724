"""Text to token ids and back: one place that knows the prompt's frame and where EOS goes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_engine.data.batching import Example
from rlhf_engine.data.records import Demonstration

EOS, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Codec:
    """A tokenizer together with how prompts are framed and how long things may be."""

    tokenizer: PreTrainedTokenizerBase
    """Any Hugging Face tokenizer with an EOS token."""
    prompt_template: str = "{prompt}\n"
    """Frame of a prompt; `{prompt}` stands for its text."""
    max_prompt_tokens: int = 512
    """Longest prompt; a longer one is refused."""
    max_response_tokens: int = 256
    """Longest response, EOS included; a longer one is refused."""
    max_tokens: int | None = None
    """Longest prompt and response together, the positions of the model that reads them; None if it has no such limit."""

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: got one without an EOS token, expected one with")
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected a text with {{prompt}} in it")

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a response."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id that fills rows; EOS where the tokenizer has no PAD, which is safe because masks are explicit."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of the framed prompt, with the special tokens that the tokenizer puts in front of a text."""
        ids = self.tokenizer(self.prompt_template.replace("{prompt}", prompt))["input_ids"]
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt: got {len(ids)} tokens, expected at most max_prompt_tokens={self.max_prompt_tokens}"
            )
        return ids

    def encode_response(self, response: str) -> list[int]:
        """Ids of the response and EOS."""
        ids = [*self.tokenizer(response, add_special_tokens=False)["input_ids"], self.eos_id]
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
        """Text of a sampled response, up to its first EOS."""
        ids = list(ids)
        if self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


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
