"""Batches for the tests of `gae` and `rollout_advantages`, and invalid `cu_seqlens`."""

import itertools

import pytest
import torch

from rlhf_kernels.launch_args import Sequences

from .gpu import DEVICE

NAN, INF = float("nan"), float("inf")


def batch(b: int, t: int, mask: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rewards, values and mask; masked entries are NaN and inf."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, t + 1, (b, 1), generator=g)
    position = torch.arange(t)
    m = {
        "all": torch.ones(b, t, dtype=torch.bool),
        "none": torch.zeros(b, t, dtype=torch.bool),
        "right padding": position < lengths,
        "left padding": position >= lengths,
        "holes": torch.rand(b, t, generator=g) < 0.6,
        "response with a hole": (position < lengths) & ((position < t // 3) | (position >= t // 2)),
    }[mask]
    rewards, values = torch.randn(b, t, generator=g), torch.randn(b, t, generator=g) + 1
    return torch.where(m, rewards, NAN), torch.where(m, values, INF), m


MASKS = ("all", "none", "right padding", "left padding", "holes", "response with a hole")


def rollout(b: int, t: int, mask: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the per-token arguments and the scores; masked entries are NaN and inf."""
    _, values, m = batch(b, t, mask, seed)
    g = torch.Generator().manual_seed(seed + 1)
    logprobs = -torch.rand(b, t, generator=g)
    ref = logprobs + 0.3 * torch.randn(b, t, generator=g)
    return {
        "scores": 2 * torch.randn(b, generator=g),
        "logprobs": torch.where(m, logprobs, NAN),
        "ref_logprobs": torch.where(m, ref, -INF),
        "values": values,
        "mask": m,
    }


def double(arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}


INVALID_CU_SEQLENS = [[0, 8], [-9, 4, 4], [2, 1 << 30], [3, 1, 2, -4]]


def check_invalid_cu_seqlens(launcher, arguments_of, ends, monkeypatch):
    """The host does not read values on a device, so the kernel must not read outside the tokens for any `cu_seqlens`."""
    x, ends = torch.full((2000,), torch.nan, device=DEVICE), torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    x[:4] = 0.5
    arguments = arguments_of(x[:4], torch.ones(2000, dtype=torch.bool, device=DEVICE)[:4], ends)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="cu_seqlens: got"):
            launcher(*arguments)
    monkeypatch.setattr(Sequences, "check", lambda *_: None)
    result = launcher(*arguments)
    inside = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    for begin, end in itertools.pairwise(ends.tolist()):
        inside[max(begin, 0) : min(end, 4)] = True
    assert all(x.shape == (4,) and x[inside].isfinite().all() for x in result)
