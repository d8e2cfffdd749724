"""Critic-free advantages: each sample against the others of its prompt."""

import torch
from torch import Tensor

from ..backend import define, kernels, resolve
from . import checks

KINDS = ("rloo", "grpo", "dr_grpo")


def group_advantages(
    scores: Tensor,  # (B,)
    groups: Tensor,  # (B,), integer: samples with the same number share a prompt
    *,
    kind: str = "rloo",
    backend: str = "auto",
) -> Tensor:  # (B,)
    """Return the advantage of each sample of a group of n, float32, no gradient.

    rloo: `s_i - mean(s_j, j != i)`, 0 for a group of one (Ahmadian et al. 2024, eq. 8);
    grpo: `(s_i - mean) / (std + 1e-4)` with unbiased std (Shao et al. 2024, section 4.1.2);
    dr_grpo: `s_i - mean` (Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3).

    Raises:
        ValueError: a shape, dtype, device or kind that does not fit.
    """
    checks.floating("scores", scores, dims=(1,), what="[B]")
    checks.integers("groups", groups, like=scores, expected=scores.shape, what="the shape of scores")
    checks.choice("kind", kind, KINDS)
    chosen = resolve("group_advantages", backend, scores)
    if chosen == "reference":
        from .. import reference

        return reference.group_advantages(checks.wide(scores), groups, kind=kind)
    return _op(scores, groups, KINDS.index(kind), chosen)


def _run(scores: Tensor, groups: Tensor, kind: int, backend: str) -> Tensor:
    return kernels(backend).group_advantages(checks.dense(scores), groups.long().contiguous(), kind)


def _fake(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


_op = define("group_advantages(Tensor scores, Tensor groups, int kind, str backend) -> Tensor", run=_run, fake=_fake)
