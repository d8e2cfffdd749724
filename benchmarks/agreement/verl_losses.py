"""The adapter of every policy loss of verl as cases: loss, metrics and gradient, with weights and global counts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.agreement import originals
from benchmarks.agreement.case import Batch, Case
from rlhf_kernels.integrations import verl

FINITE = ("holes", "lengths", "full", "one")
EXTREME = ("cispo", "dppo_tv", "dppo_kl", "geo_mean", "gpg", "dro", "sapo")
"""Losses that are also compared at log-ratios beyond ±20, where the others have differences of large numbers."""
COUNTS = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 9, "loss_scale_factor": 20}
OWN = {
    "clip_cov_ratio": 0.1,
    "clip_cov_lb": 0.05,
    "clip_cov_ub": 3.0,
    "kl_cov_ratio": 0.2,
    "ppo_kl_coef": 0.7,
    "dro_beta": 0.3,
}
FIELDS: dict[str, Any] = {
    "clip_ratio": 0.2,
    "clip_ratio_low": 0.1,
    "clip_ratio_high": 0.3,
    "clip_ratio_c": 1.5,
    "tau_pos": 0.7,
    "tau_neg": 1.4,
}


def verl_loss_cases() -> Iterator[Case]:
    """Yield two cases per loss: without and with weights and global counts."""
    theirs = originals.verl()
    for mode, ours in verl.LOSSES.items():
        batches = (*FINITE, "extreme") if mode in EXTREME else FINITE
        for note, counts in (("", {}), ("weights, global counts", COUNTS)):
            settings = object.__new__(
                theirs.ActorConfig
            )  # without the checks of settings that a policy loss does not read
            vars(settings).update(FIELDS | {"global_batch_info": counts, "policy_loss": SimpleNamespace(**OWN)})
            call = partial(_call, settings=settings, weighted=bool(counts))
            original = getattr(theirs, ours.__name__)
            side = partial(ours, faithful=True)
            yield Case("verl", "0.9.1", ours.__name__, side, original, call, ("logprobs",), batches, note)


def _call(loss: Any, b: Batch, *, settings: Any, weighted: bool) -> Any:
    torch.manual_seed(3)  # clip_cov draws tokens
    logprobs = b.logprobs.clamp(max=-1e-3)  # log-probs, as those of a policy
    weights = b.rollout_logprobs.exp() + 0.5 if weighted else None
    mask = b.mask.to(logprobs.dtype)
    return loss(b.old_logprobs, logprobs, b.advantages, mask, "seq-mean-token-mean", settings, weights)
