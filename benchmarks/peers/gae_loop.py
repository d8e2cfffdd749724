"""GAE as RLHF trainers implement it on the CPU: a Python loop over positions, with tensors over the batch."""

import torch
from torch import Tensor


def gae_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, each (B, T), without a mask: Schulman et al. 2016, eq. 16, backwards in time."""
    carried = 0.0
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        carried = rewards[:, t] + gamma * next_values - values[:, t] + gamma * lam * carried
        backwards.append(carried)
    advantages = torch.stack(backwards[::-1], dim=1)
    return advantages, advantages + values
