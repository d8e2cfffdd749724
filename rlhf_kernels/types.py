"""What the public functions return."""

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Log-probability of each token taken, and the entropy of the distribution it was taken from (None unless asked)."""

    logprobs: Tensor  # (...), float32
    entropy: Tensor | None  # (...), float32


class SampledTokens(NamedTuple):
    """Sampled ids; their log-probs under the full tempered softmax; those under the kept set that was sampled from."""

    ids: Tensor  # (B,), int64
    logprobs: Tensor  # (B,), float32
    sampling_logprobs: Tensor  # (B,), float32


class Advantages(NamedTuple):
    """Advantage estimates and the value targets `advantages + values`; 0 where the mask is False."""

    advantages: Tensor  # (B, T) or (N,), float32
    returns: Tensor  # (B, T) or (N,), float32


class RolloutAdvantages(NamedTuple):
    """GAE of the KL-shaped rewards, with the rewards and the per-token KL they were made from."""

    advantages: Tensor  # (B, T) or (N,), float32, whitened when asked
    returns: Tensor  # (B, T) or (N,), float32, never whitened
    rewards: Tensor  # (B, T) or (N,), float32
    kl: Tensor  # (B, T) or (N,), float32


class PPOLoss(NamedTuple):
    """The scalar to call `backward` on, and detached float32 scalars on its device (see `METRICS`)."""

    loss: Tensor  # ()
    metrics: dict[str, Tensor]


METRICS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "clipfrac",
    "dual_clipfrac",
    "approx_kl",
    "kl_k3",
    "ratio_mean",
    "value_clipfrac",
    "ref_kl",
    "active_fraction",
    "ratio_max",
    "num_tokens",
    "num_value_tokens",
    "returns_sum",
    "returns_sq_sum",
    "residual_sum",
    "residual_sq_sum",
)
"""Keys of `PPOLoss.metrics`. Over micro-batches that were given the global denominators all of them add, except
`ratio_max`, of which the largest counts. The last five make the explained variance."""


def explained_variance(metrics: dict[str, Tensor]) -> Tensor:
    """`1 - Var(returns - values) / Var(returns)` from the (summed) metrics of `ppo_loss`; NaN when returns are constant."""
    n = metrics["num_value_tokens"]

    def variance(kind: str) -> Tensor:
        return metrics[f"{kind}_sq_sum"] / n - (metrics[f"{kind}_sum"] / n) ** 2

    spread = variance("returns")
    return torch.where(spread > 0, 1 - variance("residual") / spread, torch.nan)
