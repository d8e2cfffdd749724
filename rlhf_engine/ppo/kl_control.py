"""Coefficients that follow a measured KL. Each is one number, so that a checkpoint holds it with the counters."""

from __future__ import annotations

import torch

from rlhf_engine.config import PPOConfig
from rlhf_engine.model import Policy
from rlhf_engine.ppo.experience import Experience, microbatch_size
from rlhf_engine.rollout import recompute

MAX_ERROR = 0.2
"""Bound of the relative error that one adaptation corrects (Ziegler et al. 2019, section 2.2)."""


def adapted_kl_coef(coef: float, kl: float, *, target: float, horizon: float, sequences: int) -> float:
    """The next weight of the reward's KL penalty, by proportional control of its logarithm.

        error = clip(kl / target - 1, ±0.2);  coef (1 + error sequences / horizon)

    where `kl` is the mean over the rollout, of a sequence or of a token as `target` is, and `horizon` counts sequences.
    Source: Ziegler et al. 2019, "Fine-tuning language models from human preferences", section 2.2.
    """
    error = min(max(kl / target - 1.0, -MAX_ERROR), MAX_ERROR)
    return coef * (1.0 + error * sequences / horizon)


def adapted_old_kl_coef(coef: float, kl: float, *, target: float) -> float:
    """The next beta of KL-penalised PPO: halved where KL(old || new) fell below target / 1.5, doubled above 1.5 target.

    Source: Schulman et al. 2017 (PPO), section 4, after equation 8.
    """
    if kl < target / 1.5:
        return coef / 2.0
    return coef * 2.0 if kl > target * 1.5 else coef


def old_policy_kl(policy: Policy, experience: Experience, config: PPOConfig, temperature: float) -> float:
    """Return the mean over tokens of KL(old || policy now), by k3 with r = new / old: `r - 1 - log r`."""
    rollout = experience.rollout
    logprobs = recompute(policy, rollout, ("logprobs",), temperature=temperature, **microbatch_size(config))["logprobs"]
    log_ratio = logprobs - experience.old_logprobs  # 0 outside the mask
    return float((torch.expm1(log_ratio) - log_ratio).sum() / rollout.mask.sum())
