"""KL coefficients that are adapted to a measured KL. Each is one number, which a checkpoint stores with the counters."""

from __future__ import annotations

import torch

from rlhf_engine.memory.passes import MicrobatchSize
from rlhf_engine.model import Policy
from rlhf_engine.ppo.experience import Experience
from rlhf_engine.rollout import recompute

MAX_ERROR = 0.2
"""Bound of the relative error in one adaptation (Ziegler et al. 2019, section 2.2)."""


def adapted_kl_coef(coef: float, kl: float, *, target: float, horizon: float, sequences: int) -> float:
    """Return the next weight of the reward's KL penalty, by proportional control of its logarithm.

        error = clip(kl / target - 1, ±0.2);  coef (1 + error sequences / horizon)

    where `kl` is the mean over the rollout, per sequence or per token like `target`, and `horizon` counts sequences.
    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", section 2.2.
    """
    error = min(max(kl / target - 1.0, -MAX_ERROR), MAX_ERROR)
    return coef * (1.0 + error * sequences / horizon)


def adapted_old_kl_coef(coef: float, kl: float, *, target: float) -> float:
    """Return the next beta of KL-penalised PPO: half if KL(old || new) is below target / 1.5, double if it is above 1.5 target.

    Source: Schulman et al. 2017 (PPO), section 4, after equation 8.
    """
    if kl < target / 1.5:
        return coef / 2.0
    return coef * 2.0 if kl > target * 1.5 else coef


def old_policy_kl(policy: Policy, experience: Experience, size: MicrobatchSize, temperature: float) -> float:
    """Return the mean over tokens of KL(old || current policy), estimated by k3 with r = new / old: `r - 1 - log r`."""
    rollout = experience.rollout
    logprobs = recompute(policy, rollout, ("logprobs",), temperature=temperature, **size)["logprobs"]
    log_ratio = logprobs - experience.old_logprobs  # 0 outside the mask
    return float((torch.expm1(log_ratio) - log_ratio).sum() / rollout.mask.sum())
