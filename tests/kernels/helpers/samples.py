"""Rows of logits for the tests of `sample_tokens`, and its filters written as plain loops."""

import math

import torch


def rows(b: int, v: int, *, seed: int = 0, dtype=torch.float32, spread: float = 3.0, step: float | None = None):
    """Return logits, and seed, sequence and position numbers; `step` rounds the logits to a grid, so that many are equal."""
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(b, v, generator=g)
    if step:
        logits = (logits / step).round() * step
    numbers = {k: torch.randint(0, 2**40, (b,), generator=g) for k in ("sequence", "position")}
    return logits.to(dtype), {"seed": 12345} | numbers


def brute_force(z: torch.Tensor, *, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """Return the probabilities of one row after the filters, by a full sort and plain loops."""
    order = sorted(range(len(z)), key=lambda i: -z[i].item())
    limit = z[order[top_k - 1]].item() if top_k and top_k < len(z) else -math.inf
    p = torch.where(z >= limit, z, -math.inf).softmax(0)
    if top_p is not None:
        mass = 0.0
        for i in order:
            mass += p[i].item()
            if mass >= top_p:
                limit = max(limit, z[i].item())
                break
    if min_p:
        limit = max(limit, z.max().item() + math.log(min_p))
    return torch.where(z >= limit, z, -math.inf).softmax(0)
