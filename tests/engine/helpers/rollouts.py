"""Rollouts of random tokens, and gradients over them."""

import torch

from rlhf_engine.config import PPOConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.ppo.experience import Experience
from rlhf_engine.ppo.minibatch import minibatch_backward
from rlhf_engine.rollout import EOS, Rollout
from tests.engine.helpers.tiny_models import VOCABULARY

PROMPTS, RESPONSES = (
    (5, 1, 7, 3, 8, 2, 4),
    (9, 1, 12, 5, 3, 11, 2),
)  # one sequence exceeds all token budgets but the last


def make_rollout(dtype: torch.dtype = torch.float32) -> Rollout:
    """Return a rollout of seven sequences of irregular lengths with random tokens."""
    generator = torch.Generator().manual_seed(3)
    prompts, responses = torch.tensor(PROMPTS), torch.tensor(RESPONSES)
    mask = torch.arange(max(RESPONSES)) < responses[:, None]
    real = torch.arange(max(PROMPTS)) < prompts[:, None]
    empty = torch.zeros(mask.shape, dtype=dtype)
    return Rollout(
        prompt_ids=torch.randint(3, VOCABULARY, real.shape, generator=generator) * real,
        prompt_lengths=prompts,
        response_ids=torch.randint(3, VOCABULARY, mask.shape, generator=generator) * mask,
        mask=mask,
        logprobs=empty,
        sampling_logprobs=empty,
        values=empty,
        stop_reason=torch.full((len(PROMPTS),), EOS),
    )


def sequence_of(rollout: Rollout, row: int) -> torch.Tensor:
    """Return prompt and response of one sequence, (its length,), without padding."""
    prompt, response = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
    return torch.cat([rollout.prompt_ids[row, :prompt], rollout.response_ids[row, :response]])


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
