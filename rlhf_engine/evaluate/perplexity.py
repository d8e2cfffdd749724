"""Perplexity of a language model on texts."""

import math
from collections.abc import Sequence

from rlhf_engine.data import Example
from rlhf_engine.model import ActorCritic
from rlhf_engine.train.sft import evaluate_nll


def perplexity(actor: ActorCritic, examples: Sequence[Example], *, pad_id: int, batch_size: int = 32) -> float:
    """`exp` of the mean negative log-likelihood of the response tokens.

    Raises:
        ValueError: no examples.
    """
    if not examples:
        raise ValueError("examples: got none, expected at least one")
    return math.exp(evaluate_nll(actor, examples, batch_size, pad_id))
