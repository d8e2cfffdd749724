"""Coefficients that follow a measured KL. Each is one number, so that a checkpoint holds it with the counters."""

from __future__ import annotations

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
