"""Per-token estimators of KL(policy || reference)."""

from torch import Tensor

from .. import reference
from . import checks

ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl_penalty(
    logprobs: Tensor,  # any shape
    ref_logprobs: Tensor,  # same shape
    *,
    estimator: str = "k1",
    backend: str = "auto",
) -> Tensor:
    """Estimate of KL(policy || reference) from one sampled token, float32, differentiable in `logprobs`.

    With `d = logprobs - ref_logprobs`: k1 = d (unbiased), k2 = d²/2 (low variance, biased), k3 = exp(-d) - 1 + d
    (unbiased, never negative), abs = |d|.

    Source: Schulman 2020, "Approximating KL divergence"; k1 is the penalty of InstructGPT, eq. 2.

    Raises:
        ValueError: shapes, dtypes or devices that differ, an unknown estimator.
    """
    checks.floating("logprobs", logprobs, dims=tuple(range(8)), what="any shape")
    checks.tensor("ref_logprobs", ref_logprobs, like=logprobs, expected=logprobs.shape, what="the shape of logprobs")
    checks.choice("estimator", estimator, ESTIMATORS)
    return reference.kl_penalty(checks.widen(logprobs), checks.widen(ref_logprobs), estimator=estimator)
