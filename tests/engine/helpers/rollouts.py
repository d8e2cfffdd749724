"""Rollouts of random tokens, and gradients over them."""

import torch

from rlhf_engine.config import PPOConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.ppo.experience import Experience
from rlhf_engine.ppo.loss import minibatch_backward
from rlhf_engine.rollout import EOS, Rollout
from tests.engine.helpers.tiny_models import VOCABULARY

PROMPTS, RESPONSES = (5, 1, 7, 3, 8, 2, 4), (9, 1, 12, 5, 3, 11, 2)  # one of them longer than every budget but the last


def make_rollout(dtype: torch.dtype = torch.float32) -> Rollout:
    """Seven sequences of odd lengths with random tokens."""
    generator = torch.Generator().manual_seed(3)
    p, t = max(PROMPTS), max(RESPONSES)
    input_ids = torch.randint(3, VOCABULARY, (len(PROMPTS), p + t), generator=generator)
    prompts, responses = torch.tensor(PROMPTS)[:, None], torch.tensor(RESPONSES)[:, None]
    mask = torch.arange(t) < responses
    attention_mask = torch.cat([torch.arange(p) >= p - prompts, mask], 1).long()
    empty = torch.zeros(len(PROMPTS), t, dtype=dtype)
    return Rollout(
        input_ids=input_ids * attention_mask,
        attention_mask=attention_mask,
        response_ids=(input_ids * attention_mask)[:, p:],
        mask=mask,
        logprobs=empty,
        sampling_logprobs=empty,
        values=empty,
        stop_reason=torch.full((len(PROMPTS),), EOS),
    )


def random_experience(rollout: Rollout) -> Experience:
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(4, *rollout.mask.shape, generator=generator).to(rollout.mask.device) * rollout.mask
    return Experience(rollout, noise[0] * 0.1 - 4.0, noise[1], noise[2], noise[3], None)


def gradients(policy: ActorCritic, rollout: Rollout, **settings) -> dict[str, torch.Tensor]:
    policy.zero_grad()
    config = PPOConfig(**{"rollout_batch": 7, "minibatch": 7, **settings})
    everyone = torch.arange(len(rollout), device=policy.device)
    minibatch_backward(policy, random_experience(rollout), everyone, config, 0.7)
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
