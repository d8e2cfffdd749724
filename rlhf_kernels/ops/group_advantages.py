"""Advantages without a critic: the score of a response relative to the other responses to its prompt."""

import torch
from torch import Tensor

from ..backend import define, kernels, resolve
from . import checks

KINDS = ("rloo", "grpo", "dr_grpo")


def group_advantages(
    scores: Tensor,  # (B,)
    groups: Tensor,  # (B,), integer: responses with the same number share a prompt
    *,
    kind: str = "rloo",
    backend: str = "auto",
) -> Tensor:  # (B,)
    """Return the advantage of each response relative to its group, in float32 and without a gradient.

        rloo:     s_i - mean(s_j, j != i),  0 for a group of one
        grpo:     (s_i - mean(s)) / (std(s) + 1e-4)
        dr_grpo:  s_i - mean(s)

    where s are the scores of the responses to one prompt and std is the unbiased standard deviation.

    Source: Ahmadian et al. 2024 (RLOO), eq. 8; Shao et al. 2024 (GRPO), section 4.1.2; Liu et al. 2025, "Understanding
    R1-Zero-Like Training", section 3 (Dr. GRPO).

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
