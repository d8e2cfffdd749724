"""The PPO policy loss from hidden states, implemented with other packages.

A peer is a function that imports its package and returns `loss(hidden, weight, batch) -> scalar`. The peers differ in how they
compute log-probs and share the objective, except for Liger, whose kernel contains the objective.

B sequences, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CLIPRANGE = 0.2


class Batch(NamedTuple):
    """Inputs of the loss other than hidden states and weight."""

    ids: Tensor  # (B, T)
    old_logprobs: Tensor  # (B, T)
    advantages: Tensor  # (B, T)
    mask: Tensor  # (B, T), bool


Loss = Callable[[Tensor, Tensor, Batch], Tensor]


def clipped_surrogate(logprobs: Tensor, batch: Batch) -> Tensor:
    """Return -mean over True tokens of min(r A, clip(r, 1 ± cliprange) A), where r = exp(logprobs - old_logprobs)."""
    ratio = torch.exp(logprobs.float() - batch.old_logprobs)
    clipped = ratio.clamp(1 - CLIPRANGE, 1 + CLIPRANGE)
    objective = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    return -(objective * batch.mask).sum() / batch.mask.sum()


def cce_torch_compile() -> Loss:
    """Return a loss with Apple's cut-cross-entropy in its implementation for CPUs, `torch_compile`; its kernel needs a GPU."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        nll = linear_cross_entropy(hidden, weight, batch.ids, reduction="none", impl="torch_compile")
        return clipped_surrogate(-nll, batch)

    return loss


def torch_linear_cross_entropy() -> Loss:
    """Return a loss with `torch.nn.functional.linear_cross_entropy` on its default path."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy; install torch 2.13")

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        nll = F.linear_cross_entropy(hidden.flatten(0, 1), weight, batch.ids.flatten(), reduction="none")
        return clipped_surrogate(-nll.view_as(batch.ids), batch)

    return loss


def compiled_eager() -> Loss:
    """Return `torch.compile` of `eager`."""
    return torch.compile(eager(), dynamic=False)


def trl_selective_log_softmax() -> Loss:
    """Return a loss with TRL's memory-saving log-probs, a loop over sequences."""
    from trl.trainer.utils import selective_log_softmax

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        return clipped_surrogate(selective_log_softmax(hidden @ weight.T, batch.ids), batch)

    return loss


def eager() -> Loss:
    """Return a loss with log_softmax in float32 and then gather, the usual first implementation."""

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        logprobs = (hidden @ weight.T).float().log_softmax(-1)
        return clipped_surrogate(logprobs.gather(-1, batch.ids.unsqueeze(-1)).squeeze(-1), batch)

    return loss


def liger_grpo() -> Loss:
    """Return Liger's chunked loss. It supports only one advantage per sequence, so it receives the first of each sequence."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    grpo = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="bnpo", epsilon_low=CLIPRANGE, epsilon_high=CLIPRANGE
    )

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        advantages = batch.advantages[:, 0]
        return grpo(hidden, weight, batch.ids, batch.mask, advantages, old_per_token_logps=batch.old_logprobs)[0]

    return loss


PEERS: dict[str, Callable[[], Loss]] = {
    "CCE torch_compile": cce_torch_compile,
    "torch F.linear_cross_entropy": torch_linear_cross_entropy,
    "torch.compile of eager": compiled_eager,
    "TRL selective_log_softmax": trl_selective_log_softmax,
    "log_softmax + gather": eager,
    "Liger chunked GRPO": liger_grpo,
}
COMPILING = ("CCE torch_compile", "torch.compile of eager", "Liger chunked GRPO")
"""Peers whose first call runs a compiler in the process; their memory is measured after that call."""
