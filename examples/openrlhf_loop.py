"""OpenRLHF's PPO arithmetic in a minimal loop, with our modules instead of those of `openrlhf.models`."""

from __future__ import annotations

import copy

import torch
from toy import Policy, respond

from rlhf_kernels import linear_token_logprobs
from rlhf_kernels.integrations.openrlhf import (  # from openrlhf.models.loss and openrlhf.models.utils import ...
    PolicyLoss,
    ValueLoss,
    compute_approx_kl,
    compute_reward,
    get_advantages_and_returns,
    normalize_advantages,
)


def log_probs(policy: Policy, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return linear_token_logprobs(policy.states(ids), policy.head.weight, ids, mask=mask).logprobs


def train(updates: int = 40) -> list[float]:
    """Train a policy and return the mean score of each update's responses."""
    torch.manual_seed(0)
    policy, policy_loss, value_loss = Policy(), PolicyLoss(), ValueLoss(clip_eps=0.2)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    scores = []
    for update in range(updates):
        ids, mask, score = respond(policy, update)
        with torch.no_grad():
            old, values = log_probs(policy, ids, mask), policy.value_head(policy.states(ids)).squeeze(-1)
            kl = compute_approx_kl(old, log_probs(reference, ids, mask))
            rewards = compute_reward(score, 0.02, kl, mask, reward_clip_range=(-10, 10))
            advantages, returns = get_advantages_and_returns(values, rewards, mask, 1.0, 0.95)
            (advantages,) = normalize_advantages([advantages], [mask])
        for _ in range(4):
            loss, *_ = policy_loss(log_probs(policy, ids, mask), old, advantages, mask)
            loss = loss + 0.1 * value_loss(policy.value_head(policy.states(ids)).squeeze(-1), values, returns, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores.append(score.mean().item())
    return scores


if __name__ == "__main__":
    history = train()
    print(f"mean score {history[0]:.2f} -> {history[-1]:.2f}")
