"""What trainers compute per step on tensors of log-probs and values, as they write it in eager PyTorch.

The formulas and metrics are those of OpenRLHF 0.11, verl 0.9, DeepSpeed-Chat, TRL and torchtune. Masks are 0 and 1 in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    mean = masked_mean(x, mask)
    centred = x - mean
    variance = masked_mean(centred**2, mask)
    n = mask.sum()
    return centred * torch.rsqrt(variance * n / (n - 1) + 1e-8)


def openrlhf_policy(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    moved = (new - old).clamp(-20, 20)
    ratio = moved.exp()
    plain, clipped = ratio * advantages, ratio.clamp(0.8, 1.2) * advantages
    loss = masked_mean(-torch.min(plain, clipped), mask)
    return loss, masked_mean((clipped < plain).float(), mask).detach(), masked_mean(-moved.detach(), mask)


def clipped_values(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    clipped = old + (values - old).clamp(-0.2, 0.2)
    return 0.5 * masked_mean(torch.max((clipped - returns) ** 2, (values - returns) ** 2), mask)


def verl_policy(old: Tensor, new: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    moved = (new - old).clamp(-20, 20)
    ratio = moved.exp()
    kl = masked_mean(-moved, mask)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    larger, bound = torch.maximum(plain, clipped), -advantages * 3.0
    clipfrac = masked_mean((clipped > plain).float(), mask)
    lower = masked_mean((larger > bound) * (advantages < 0).float(), mask)
    losses = torch.where(advantages < 0, torch.min(bound, larger), larger)
    return masked_mean(losses, mask), clipfrac, kl, lower


def verl_values(values: Tensor, returns: Tensor, old: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    clipped = torch.max(torch.min(values, old + 0.2), old - 0.2)
    plain, limited = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(plain, limited), mask)
    return loss, masked_mean((limited > plain).float(), mask)


def verl_kl(new: Tensor, reference: Tensor) -> Tensor:
    moved = (reference - new).clamp(-20, 20)
    return (moved.exp() - moved - 1).clamp(-10, 10)


def deepspeed_actor(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = ((new - old) * mask).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)
    return (torch.max(plain, clipped) * mask).sum() / mask.sum()


def torchtune_ppo(
    old: Tensor, new: Tensor, advantages: Tensor, old_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    ratio = (new - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    plain, limited = -advantages * ratio, -advantages * clipped
    clipfrac = masked_mean((limited > plain).float(), mask)
    policy = masked_mean(torch.maximum(plain, limited), mask)
    value = clipped_values(values, old_values, returns, mask)
    return policy + 0.1 * value, policy.detach(), value.detach(), ratio.mean().detach(), clipfrac.detach()


def trl_rewards(scores: Tensor, new: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    rewards = -0.05 * (new - reference) * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def group_advantages(scores: Tensor, size: int) -> Tensor:
    grouped = scores.view(-1, size)
    mean, std = grouped.mean(1).repeat_interleave(size), grouped.std(1).repeat_interleave(size)
    return (scores - mean) / (std + 1e-4)


def truncated_weights(new: Tensor, sampler: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    weights = (new - sampler).clamp(-20, 20).exp()
    return weights.clamp(max=2.0) * mask, masked_mean((weights > 2.0).float(), mask)


def entropy_mask(entropy: Tensor, mask: Tensor) -> Tensor:
    threshold = torch.quantile(entropy[mask.bool()], 0.8)
    return (entropy >= threshold) & mask.bool()


def token_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, ids[..., None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)
