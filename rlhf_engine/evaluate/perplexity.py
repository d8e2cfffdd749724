"""Perplexity of a language model on texts. On pretraining text it measures what alignment cost."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_engine.data import EXAMPLES, Codec, Example, read_texts, stored
from rlhf_engine.model import LanguageModel
from rlhf_engine.supervised.sft import evaluate_nll


def perplexity(actor: LanguageModel, examples: Sequence[Example], *, pad_id: int, batch_size: int = 32) -> float:
    """Return `exp` of the mean negative log-likelihood of the response tokens.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("examples: got none, expected at least one")
    return math.exp(evaluate_nll(actor, examples, batch_size, pad_id))


def read_documents(path: str | Path, codec: Codec, near: str | Path) -> Sequence[Example]:
    """Return the documents that `read_texts` finds, each with BOS and EOS, in pieces that fit the model's positions.

    Their token ids are in a temporary file on the disk of `near`.

    Raises:
        ValueError: the file does not exist or has no text.
    """
    pieces = stored(_pieces(path, codec), EXAMPLES, near)
    if not pieces:
        raise ValueError(f"{path} contains no text; give a file with text")
    return pieces


def _pieces(path: str | Path, codec: Codec) -> Iterator[Example]:
    prefix = codec.prefix
    for document in read_texts(path):
        # Every piece begins as a prompt does, for example with BOS.
        ids = tuple(codec.encode_documents([document.text])[0][len(prefix) :])
        size = (codec.max_tokens or len(prefix) + len(ids)) - len(prefix)
        pieces = (Example((), (*prefix, *ids[at : at + size])) for at in range(0, len(ids), size))
        # The first token of a piece has no context and is not predicted, so a piece of one token has no likelihood.
        yield from (piece for piece in pieces if len(piece) > 1)
