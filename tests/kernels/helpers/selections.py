"""Batches for the tests of the ops that weight and select tokens."""

import torch

NAN = float("nan")
RULES = [
    {"high": 1.2},
    {"high": None},
    {"action": "clip", "low": 0.8, "high": 1.2},
    {"action": "clip", "low": 0.8, "high": None},
    {"action": "mask", "low": 0.8, "high": 1.2},
    {"action": "mask", "low": None, "high": 1.2},
    {"action": "mask", "metric": "k1", "low": -0.1, "high": 0.1},
    {"action": "mask", "metric": "k2", "high": 0.02},
    {"action": "mask", "metric": "k3", "high": 0.02},
]
LEVELS = ("token", "sequence", "geometric")


def batch(b: int, t: int, *, drift: float = 0.3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return log-probs, those of the sampler, and a mask with holes and an empty row; masked entries are NaN."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, t, generator=g) < 0.7
    mask[b // 2] = False
    logprobs = -torch.rand(b, t, generator=g)
    sampler = logprobs + drift * torch.randn(b, t, generator=g)
    found = {"logprobs": logprobs, "sampler_logprobs": sampler}
    return {k: torch.where(mask, x, NAN) for k, x in found.items()} | {"mask": mask}


def packed(tokens: dict[str, torch.Tensor], lengths: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the first `lengths` tokens of each row as (N,) tensors, and their `cu_seqlens`."""
    inside = torch.arange(tokens["mask"].shape[1]) < lengths[:, None]
    ends = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    return {k: x[inside] for k, x in tokens.items()}, ends
