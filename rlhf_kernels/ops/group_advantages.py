"""Advantages without a critic: the score of a response relative to the other responses to its prompt."""

import torch
from torch import Tensor

from ..backend import define, kernels, resolve
from . import checks

KINDS = ("rloo", "grpo", "dr_grpo")
EPS, STDS = 1e-4, ("sample", "population")


def group_advantages(
    scores: Tensor,  # (B,)
    groups: Tensor,  # (B,), integer: responses with the same number share a prompt
    *,
    kind: str = "rloo",
    eps: float = EPS,
    std: str = "sample",
    backend: str = "auto",
) -> Tensor:  # (B,)
    """Return the advantage of each response relative to its group, in float32 and without a gradient.

        rloo:     s_i - mean(s_j, j != i),  0 for a group of one
        grpo:     (s_i - mean(s)) / (std(s) + eps)
        dr_grpo:  s_i - mean(s)

    where s are the scores of the responses to one prompt. `std` is "sample" (divide by the count minus 1) or
    "population" (divide by the count). TRL has `eps` 1e-4, verl 1e-6. Only "grpo" reads `eps` and `std`.

    Source: Ahmadian et al. 2024 (RLOO), eq. 8; Shao et al. 2024 (GRPO), section 4.1.2; Liu et al. 2025, "Understanding
    R1-Zero-Like Training", section 3 (Dr. GRPO).

    Raises:
        ValueError: a shape, dtype, device or kind that does not fit, or an option that the kind does not read.
    """
    checks.floating("scores", scores, dims=(1,), what="[B]")
    checks.integers("groups", groups, like=scores, expected=scores.shape, what="the shape of scores")
    checks.choice("kind", kind, KINDS)
    checks.number("eps", eps, above=0)
    checks.choice("std", std, STDS)
    for name, value, default in (("eps", eps, EPS), ("std", std, "sample")):
        if kind != "grpo" and value != default:
            raise ValueError(f"{name}: got {value!r} with kind={kind!r}; only 'grpo' reads it")
    chosen = resolve("group_advantages", backend, scores)
    if chosen == "reference":
        from .. import reference

        return reference.group_advantages(checks.wide(scores), groups, kind=kind, eps=eps, std=std)
    return _op(scores, groups, KINDS.index(kind), float(eps), std == "population", chosen)


def _run(scores: Tensor, groups: Tensor, kind: int, eps: float, population: bool, backend: str) -> Tensor:
    return kernels(backend).group_advantages(checks.dense(scores), groups.long().contiguous(), kind, eps, population)


def _fake(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


_op = define(
    "group_advantages(Tensor scores, Tensor groups, int kind, float eps, bool population, str backend) -> Tensor",
    run=_run,
    fake=_fake,
)
