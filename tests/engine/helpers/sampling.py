"""Generators of tiny models, and the comparison of sequences of two rollouts."""

import torch

from rlhf_engine.config import RolloutConfig
from rlhf_engine.model import ActorCritic, ValueHead
from rlhf_engine.rollout import Generator
from tests.engine.helpers.tiny_models import VOCABULARY, tiny

ENDS = (2, 7, 9)


def make_prompts(count, longest=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def make_actor(family="llama", **changes):
    generator = torch.Generator().manual_seed(5)
    return ActorCritic(tiny(family, **changes), ValueHead.from_weights(torch.randn(32, generator=generator), 0.5))


def make_generator(actor, *, seed=3, ends=ENDS, **settings):
    settings = {"max_prompt_tokens": 20, "max_response_tokens": 12, "batch_size": 16, **settings}
    return Generator(actor, RolloutConfig(**settings), eos_token_ids=ends, pad_token_id=0, seed=seed)


def same_sequence(left, i, right, j):
    n = int(left.response_lengths[i])
    if n != int(right.response_lengths[j]) or bool(left.ended[i]) != bool(right.ended[j]):
        return False
    names = ("response_ids", "logprobs", "sampling_logprobs", "values")
    return all(torch.equal(getattr(left, name)[i, :n], getattr(right, name)[j, :n]) for name in names)
