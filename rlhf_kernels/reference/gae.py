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
    lam: float | Tensor = 0.95,  # (B,) if a tensor
    value_gamma: float | None = None,
    value_lam: float | Tensor | None = None,  # (B,) if a tensor
    bootstrap: Tensor | None = None,  # (B,)
    holes: str = "skip",
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> Advantages:
    """Compute `A_t = δ_t + γλ A_{t+1}`, `δ_t = r_t + γ V_{t+1} - V_t` from the last action to the first."""
    rewards, values, mask = (pad(x, cu_seqlens) for x in (rewards, values, mask))
    rewards = torch.where(mask, rewards, 0)
    values = torch.where(mask, values, 0)
    after = values.new_zeros(len(values)) if bootstrap is None else bootstrap.to(values.dtype)
    advantages = _recurrence(rewards, values, mask, gamma, lam, after, holes)
    targets = advantages
    if value_gamma is not None or value_lam is not None:
        gamma, lam = gamma if value_gamma is None else value_gamma, lam if value_lam is None else value_lam
        targets = _recurrence(rewards, values, mask, gamma, lam, after, holes)
    returns = torch.where(mask, targets + values, 0)
    return Advantages(unpad(advantages, cu_seqlens), unpad(returns, cu_seqlens))


def _recurrence(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor, next_value: Tensor, holes: str
) -> Tensor:
    """Return the advantages (B, T); `next_value` (B,) is the value after the last action."""
    decay = gamma * (lam.to(values.dtype) if isinstance(lam, Tensor) else lam)
    carry = torch.zeros_like(next_value)
    seen_action = mask.new_zeros(len(mask))
    advantages = torch.zeros_like(values)
    for t in reversed(range(mask.shape[1])):
        m = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = delta + decay * carry
        # Positions after the last action are padding, not holes: the bootstrap value is not discounted over them.
        step = m if holes == "skip" else m | seen_action
        carry = torch.where(step, carried, carry)
        next_value = torch.where(step, values[:, t], next_value)
        seen_action = seen_action | m
        advantages[:, t] = torch.where(m, carry, 0)
    return advantages
