"""The definition of `gae` in eager PyTorch."""

import torch
from torch import Tensor

from ..launch_args import Advantages
from .segments import pad, unpad


def gae(
    rewards: Tensor,  # (B, T) or (N,)
    values: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,  # (B,)
    holes: str = "skip",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> Advantages:
    """Compute `A_t = δ_t + γλ A_{t+1}`, `δ_t = r_t + γ V_{t+1} - V_t` from the last action to the first."""
    rewards, values, mask = (pad(x, cu_seqlens) for x in (rewards, values, mask))
    rewards = torch.where(mask, rewards, 0)
    values = torch.where(mask, values, 0)
    next_value = values.new_zeros(len(values)) if bootstrap is None else bootstrap.to(values.dtype)
    carry = torch.zeros_like(next_value)
    seen_action = mask.new_zeros(len(mask))
    advantages = torch.zeros_like(values)
    for t in reversed(range(mask.shape[1])):
        m = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = delta + gamma * lam * carry
        # Positions after the last action are padding, not holes: the bootstrap value is not discounted over them.
        step = m if holes == "skip" else m | seen_action
        carry = torch.where(step, carried, carry)
        next_value = torch.where(step, values[:, t], next_value)
        seen_action = seen_action | m
        advantages[:, t] = torch.where(m, carry, 0)
    returns = torch.where(mask, advantages + values, 0)
    return Advantages(unpad(advantages, cu_seqlens), unpad(returns, cu_seqlens))
