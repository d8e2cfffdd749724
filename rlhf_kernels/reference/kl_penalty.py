"""The definition of `kl_penalty` in eager PyTorch."""

import torch
from torch import Tensor


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Return an estimate of KL(policy || reference) per token, from `d = logprobs - ref_logprobs`."""
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    if estimator == "k3":
        return torch.expm1(-d) + d
    return d.abs()
