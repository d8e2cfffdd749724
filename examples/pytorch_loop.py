"""A plain PyTorch loop with one call each for responses, advantages and the whole PPO loss from hidden states."""

from __future__ import annotations

import copy

import torch
from toy import Policy, respond

from rlhf_kernels import linear_ppo_loss, linear_token_logprobs, rollout_advantages


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
            states = policy.states(ids)
            old = linear_token_logprobs(states, policy.head.weight, ids, mask=mask).logprobs
            ref = linear_token_logprobs(reference.states(ids), reference.head.weight, ids, mask=mask).logprobs
            old_values = policy.value_head(states).squeeze(-1)
            advantages, returns, *_ = rollout_advantages(score, old, ref, old_values, mask, kl_coef=0.02)
        for _ in range(4):
            loss, _ = linear_ppo_loss(
                policy.states(ids),
                policy.head.weight,
                ids,
                old,
                advantages,
                mask,
                value_weight=policy.value_head.weight[0],
                value_bias=policy.value_head.bias[0],
                old_values=old_values,
                returns=returns,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores.append(score.mean().item())
    return scores


if __name__ == "__main__":
    history = train()
    print(f"mean score {history[0]:.2f} -> {history[-1]:.2f}")
