"""Specimens of the launchers that weight, select and distil tokens; see `specimens`.

Legend: N tokens = B sequences of T positions, K listed tokens.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from benchmarks.gpu.specimens import FORMS, Call, Rows, Size, layout_of, ones
from rlhf_kernels.backend import Kernels
from rlhf_kernels.launch_args import Sequences
from rlhf_kernels.token_args import DIRECTIONS, IMPORTANCE_LEVELS, IMPORTANCE_STATISTICS, TopkRows, TopkRule


def selection_specimens() -> dict[str, tuple[str, Call]]:
    """Return the specimens: name -> (name of the launcher, call)."""
    found: dict[str, tuple[str, Call]] = {}
    for level, kind in enumerate(IMPORTANCE_LEVELS):
        for statistic, bounded in enumerate(IMPORTANCE_STATISTICS):
            action = 1 if statistic else 2 * (level % 2)
            name = f"importance_weights {kind}, {bounded}, action {action}"
            found[name] = "importance_weights", partial(importance, level, action, statistic)
    for direction, kind in enumerate(DIRECTIONS):
        for form in FORMS[direction::2]:
            found[f"topk_epilogue {kind}, {form}"] = "topk_epilogue", partial(topk, direction, form)
    return found


def importance(level: int, action: int, statistic: int, kernels: Kernels, size: Size) -> None:
    packed = statistic % 2 == 1
    shape, cu_seqlens = layout_of(packed, size)
    tokens, advantages = torch.zeros(shape), torch.zeros(shape) if packed and level == 2 else None
    bounds = size.coefficient / 2, math.inf if action == 0 else size.coefficient
    sequences = Sequences.of(tokens, cu_seqlens)
    kernels.importance_weights(tokens, tokens, ones(*shape), advantages, sequences, level, action, statistic, *bounds)


def topk(direction: int, form: Rows, kernels: Kernels, size: Size) -> None:
    x, k = form.make(size), 64
    weight = torch.ones(size.n) if form.every_flag else None
    rule = TopkRule(direction, form.every_flag, min(0.9, size.coefficient))
    ids = torch.arange(size.n * k).view(size.n, k) % form.vocabulary
    rows = TopkRows(rule, ids, torch.zeros(size.n, k), weight)
    kernels.topk_epilogue(x, rows, torch.empty(3, size.n), form.out(x))
