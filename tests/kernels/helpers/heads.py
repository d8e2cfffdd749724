"""Batches for the tests of the ops that start from hidden states or logits."""

import torch
from torch import Tensor

from rlhf_kernels import reference


def make(seed: int, dtype=torch.float32, *, b=4, t=40, vocabulary=203, hidden=24, keep=0.7, drift=0.3):
    """Return differentiable tensors, per-token constants and optional tensors.

    Some ratios are beyond each clip bound, with both signs of the advantage.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=g)

    leaves = {
        "hidden": normal(b, t, hidden),
        "weight": normal(vocabulary, hidden, scale=0.3),
        "bias": normal(vocabulary, scale=0.3),
        "value_weight": normal(hidden, scale=0.3),
        "value_bias": torch.tensor(0.2),
    }
    leaves = {k: v.to(dtype) for k, v in leaves.items()}
    ids = torch.randint(0, vocabulary, (b, t), generator=g)
    exact = reference.linear_token_logprobs(
        *(leaves[k].double() for k in ("hidden", "weight")), ids, bias=leaves["bias"].double()
    )
    logprobs = exact.logprobs.float()
    constants = {
        "ids": ids,
        "old_logprobs": logprobs + normal(b, t, scale=drift),
        "advantages": normal(b, t) * (torch.rand(b, t, generator=g) > 0.2),
        "mask": torch.rand(b, t, generator=g) < keep,
    }
    extra = {
        "returns": normal(b, t),
        "old_values": normal(b, t),
        "ref_logprobs": logprobs + normal(b, t, scale=0.2),
        "weights": torch.rand(b, t, generator=g),
        "temperature": torch.rand(b, t, generator=g) + 0.5,
    }
    return leaves, constants, extra


def widen(x, dtype: torch.dtype):
    """Return a floating point tensor in `dtype`, and any other value unchanged."""
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def differentiate(loss: Tensor, leaves: dict[str, Tensor], upstream: float = 0.37) -> dict[str, Tensor]:
    """Return the gradients of `upstream * loss`, zeros for a leaf on which the loss does not depend."""
    (upstream * loss).backward()
    return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
