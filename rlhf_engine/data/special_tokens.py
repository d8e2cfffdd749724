"""Special tokens of a tokenizer, and the exact text of token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_engine.errors import foreign_errors


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of a tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return tuple({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})


def first_of(tokens: frozenset[str], text: str) -> tuple[int, str] | None:
    """Return the position and the text of the first of `tokens` in `text`, the longest one if several begin there."""
    found = [(text.index(token), -len(token), token) for token in tokens if token in text]
    return (min(found)[0], min(found)[2]) if found else None


def token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Return the id of the token with this text, such as a special token."""
    return cast("int", tokenizer.convert_tokens_to_ids(text))  # it returns a list only for a list


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: bool) -> list[list[int]]:
    """Return the ids of texts. `options` are those of the tokenizer's call.

    Raises:
        ValueError: the tokenizer fails, for example because a file of it is broken in a part that loading does not read.
    """
    call = cast("Callable[..., Mapping[str, list[list[int]]]]", tokenizer)
    with foreign_errors("tokenizer: it cannot encode a text"):
        return call(list(texts), **options)["input_ids"]


def silent_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of BOS, EOS and PAD, which no text has."""
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return frozenset(cast("int", token) for token in ids if token is not None)


def exact_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], dropped: frozenset[int] = frozenset()) -> str:
    """Return the text of ids without those in `dropped`; white space is not cleaned up."""
    kept = [token for token in ids if token not in dropped]
    with foreign_errors("tokenizer: it cannot decode ids"):
        # `decode` returns a list only for a batch.
        return cast("str", tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))
