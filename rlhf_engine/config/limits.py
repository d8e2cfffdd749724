"""Settings of limits on a run's metrics."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_engine.config.schema import Count, NonNegative, Positive, Section


@dataclass(frozen=True)
class LimitsConfig(Section):
    """Limits on metrics of an update. One counts when it is exceeded in `updates` updates in a row."""

    kl: Positive | None = None
    """Upper limit of `kl`, the KL to the reference in nats per sequence. If None, there is none."""
    kl_per_token: Positive | None = None
    """Upper limit of `kl_per_token`, the same in nats per token. If None, there is none."""
    entropy: NonNegative | None = None
    """Lower limit of `entropy`, in nats per token. If None, there is none."""
    grad_norm: Positive | None = None
    """Upper limit of `grad_norm`, the norm before clipping. If None, there is none."""
    updates: Count = 3
    """Number of updates in a row, because a single batch may exceed a limit by chance."""
