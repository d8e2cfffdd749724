"""Batches for the tests of the masked statistics."""

import torch

NAN = float("nan")


def batch(*shape: int, keep: float = 0.7, mean: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(*shape, generator=g) < keep
    return torch.where(mask, mean + torch.randn(*shape, generator=g), NAN), mask
