"""verl's PPO arithmetic in a minimal loop, with our functions instead of those of `verl.trainer.ppo.core_algos`."""

from __future__ import annotations

import copy

import torch
from toy import RESPONSE, Policy, respond

from rlhf_kernels.integrations.verl import (  # from verl.trainer.ppo.core_algos import ...
    compute_gae_advantage_return,
    compute_policy_loss,
    compute_value_loss,
    kl_penalty,
    linear_cross_entropy,
)


def log_probs(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    """Return log-probs computed from hidden states, like verl's fused kernels."""
    return linear_cross_entropy(policy.states(ids), policy.head.weight, ids)[0].view(-1, RESPONSE)


def train(updates: int = 40) -> list[float]:
    """Train a policy and return the mean score of each update's responses."""
    torch.manual_seed(0)
    policy = Policy()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    scores = []
    for update in range(updates):
        ids, mask, score = respond(policy, update)
        with torch.no_grad():
            old, values = log_probs(policy, ids), policy.value_head(policy.states(ids)).squeeze(-1)
            rewards = -0.02 * kl_penalty(old, log_probs(reference, ids), "kl")
            rewards[torch.arange(len(ids)), mask.sum(1) - 1] += score
            advantages, returns = compute_gae_advantage_return(rewards, values, mask, gamma=1.0, lam=0.95)
        for _ in range(4):
            policy_loss, *_ = compute_policy_loss(old, log_probs(policy, ids), advantages, mask, cliprange=0.2)
            vpreds = policy.value_head(policy.states(ids)).squeeze(-1)
            value_loss, _ = compute_value_loss(vpreds, returns, values, mask, cliprange_value=0.2)
            optimizer.zero_grad()
            (policy_loss + 0.1 * value_loss).backward()
            optimizer.step()
        scores.append(score.mean().item())
    return scores


if __name__ == "__main__":
    history = train()
    print(f"mean score {history[0]:.2f} -> {history[-1]:.2f}")
