"""torchtune's PPO loss and advantages as cases, with and without masks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.agreement import originals
from benchmarks.agreement.case import Batch, Case
from rlhf_kernels.integrations import torchtune

RELEASE = "0.6.1"


def torchtune_cases() -> Iterator[Case]:
    """Yield the cases of `PPOLoss` and `estimate_advantages`."""
    loss, estimate = originals.torchtune()
    options = {"epsilon": 0.1, "value_clip_range": 0.2, "value_coeff": 0.3}
    sides = torchtune.PPOLoss(**options, faithful=True), loss(**options)
    advantages = partial(torchtune.estimate_advantages, faithful=True), estimate
    regular = ("holes", "lengths", "full")
    for masked in (True, False):
        note = "masks" if masked else "no masks"
        call = partial(_loss, masked=masked)
        yield Case("torchtune", RELEASE, "PPOLoss", *sides, call, ("logprobs", "values"), (*regular, "one"), note)
        call = partial(_advantages, masked=masked)
        yield Case("torchtune", RELEASE, "estimate_advantages", *advantages, call, (), regular, note)


def _masks(b: Batch, masked: bool) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the mask of the tokens and that of the values, which has the position after each response too."""
    if not masked:
        return None, None
    mask = b.mask.bool()
    return mask, mask | (torch.arange(mask.shape[1]) == b.lengths[:, None])


def _loss(loss: Any, b: Batch, *, masked: bool) -> Any:
    masks = _masks(b, masked)
    return loss(b.old_logprobs, b.logprobs, b.advantages, b.old_values, b.values, b.returns, *masks)


def _advantages(estimate: Any, b: Batch, *, masked: bool) -> Any:
    return estimate(b.values, b.rewards, 0.99, 0.95, _masks(b, masked)[0])
