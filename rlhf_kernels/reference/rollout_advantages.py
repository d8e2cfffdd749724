"""The definition of `rollout_advantages` in eager PyTorch."""

import torch
from torch import Tensor

from ..launch_args import RolloutAdvantages
from .gae import gae
from .kl_penalty import kl_penalty
from .masked import masked_whiten
from .segments import pad, unpad


def rollout_advantages(
    scores: Tensor,  # (B,)
    logprobs: Tensor,  # (B, T) or (N,)
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,  # (B,) if a tensor
    value_gamma: float | None = None,
    value_lam: float | Tensor | None = None,
    score_clip: float | None = None,
    score_index: Tensor | None = None,  # (B,), position inside the sequence
    bootstrap: Tensor | None = None,  # (B,)
    holes: str = "skip",
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
) -> RolloutAdvantages:
    """Return the rewards `r_t = -β KL_t + [t = t_score] score`, and their GAE; both are whitened if requested."""
    inside = pad(mask, cu_seqlens)
    kl = torch.where(mask, kl_penalty(logprobs, ref_logprobs, estimator=kl_estimator), 0)
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    position = torch.arange(inside.shape[1], device=mask.device)
    if score_index is None:
        score_index = (
            torch.where(inside, position, -1).amax(1) if inside.numel() else inside.new_full((len(inside),), -1)
        )
    lands = (position == score_index[:, None]) & inside.any(1, keepdim=True)
    rewards = -kl_coef * kl + unpad(torch.where(lands, scores[:, None].to(kl.dtype), 0), cu_seqlens)
    rewards = torch.where(mask, rewards, 0)
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(
        rewards,
        values,
        mask,
        gamma=gamma,
        lam=lam,
        value_gamma=value_gamma,
        value_lam=value_lam,
        bootstrap=bootstrap,
        holes=holes,
        cu_seqlens=cu_seqlens,
    )
    if whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    return RolloutAdvantages(advantages, returns, rewards, kl)
