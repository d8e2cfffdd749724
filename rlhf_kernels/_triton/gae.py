# pyright: reportArgumentType=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Advantages and value targets of padded or packed sequences."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_args import Sequences
from . import scan
from .scan import discounts, discounts_of, filled, gae_tile, last_action, load_tile, span, store_tile, tiles_of


@triton.jit(do_not_specialize=["n", "length"])
def _kernel(
    rewards, values, mask, bootstrap, cu_seqlens, advantages, returns, n, length,
    gamma, rest, decay, decay2, decay3, decay4, table, SKIP_HOLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    begin, length = span(cu_seqlens, n, length, sequence)
    after = 0.0
    if bootstrap is not None:
        after = gamma * tl.load(bootstrap + sequence)
    if table is not None:
        rest, decay, decay2, decay3, decay4 = discounts_of(table, sequence)
    seen = False
    tiles = tiles_of(length, BLOCK)
    first = (tiles - 1) * BLOCK
    count = filled(first, length, BLOCK)
    reward = load_tile(rewards + begin, first, count, BLOCK)
    value = load_tile(values + begin, first, count, BLOCK)
    m = load_tile(mask + begin, first, count, BLOCK)
    for _ in range(tiles):
        # The preceding tile is loaded while this one is scanned.
        front = first - BLOCK
        front_count = filled(front, length, BLOCK)
        front_reward = load_tile(rewards + begin, front, front_count, BLOCK)
        front_value = load_tile(values + begin, front, front_count, BLOCK)
        front_m = load_tile(mask + begin, front, front_count, BLOCK)
        last = last_action(m, BLOCK)
        advantage, after = gae_tile(
            reward, value, m, last, seen, after, rest, decay, decay2, decay3, decay4, SKIP_HOLES, BLOCK
        )
        seen = seen | (last >= 0)
        store_tile(advantages + begin, first, count, advantage, BLOCK)
        store_tile(returns + begin, first, count, tl.where(m, advantage + value, 0.0), BLOCK)
        first, count, reward, value, m = front, front_count, front_reward, front_value, front_m


def gae(
    rewards: Tensor,  # (B, T) or (N,)
    values: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    gamma: float,
    lam: float | Tensor,  # (B,) if a tensor, float32
    bootstrap: Tensor | None,  # (B,)
    skip_holes: bool,
    cu_seqlens: Tensor | None,  # (B + 1,), int32
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, one program per sequence; on a CPU the values of `cu_seqlens` are checked."""
    Sequences.of(rewards, cu_seqlens).check_on_cpu(rewards)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    b, t = rewards.shape if cu_seqlens is None else (cu_seqlens.numel() - 1, 0)
    with torch.cuda.device_of(rewards):
        _kernel[(b,)](
            rewards, values, mask, bootstrap, cu_seqlens, advantages, returns, rewards.numel(), t,
            *discounts(gamma, lam),
            SKIP_HOLES=skip_holes, **scan.GAE_TILE,
        )  # fmt: skip
    return advantages, returns
