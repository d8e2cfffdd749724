"""Settings of the step within a trust region."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_engine.config.schema import Count, NonNegative, Positive, PositiveShare, Section, Share


@dataclass(frozen=True)
class TRPOConfig(Section):
    """The constrained step of objective "trpo", for eager attention and models of up to about 50 million parameters."""

    max_kl: Positive = 0.01
    """delta, the maximum mean KL(old || new) of a step, in nats per token. The default is the paper's value."""
    cg_iterations: Count = 10
    """Maximum iterations of conjugate gradient, one Fisher-vector product each. The default is the paper's value."""
    cg_tolerance: Share = 1e-5
    """Norm of the residual at which conjugate gradient stops, as a fraction of the norm of the gradient."""
    damping: NonNegative = 0.1
    """Added to the diagonal of the Fisher matrix, which is singular because a rollout has fewer states than the model
    has weights."""
    backtracks: Count = 10
    """Maximum number of step sizes that the line search tries; each is `shrink` times the previous one."""
    shrink: PositiveShare = 0.5
    """Factor between successive step sizes of the line search, below 1."""

    def check(self) -> None:
        """Raise ValueError if the line search would repeat the same step."""
        if self.shrink == 1.0:
            raise ValueError("shrink: got 1.0, expected a number below 1; with 1 the line search repeats the same step")
