# pyright: reportArgumentType=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""KL-shaped rewards, GAE and the statistics of the advantages in one launch; whitening is a second pass over the advantages.

Whitened rewards need their statistics before the recurrence, so a launch over the log-probs precedes it, and the rewards are
computed twice. The kernels read and write 29 bytes per token, 9 more for whitened advantages (one of them the mask), and 9
more for whitened rewards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_args import Sequences
from . import scan
from .masked import moments, new_parts, statistics_of, store_moments, whiten, whitened
from .math import K3, kl_value
from .scan import discounts, discounts_of, gae_tile, last_action, load_tile, span, store_tile, tiles_of


@triton.jit
def _clipped_score(scores, sequence, score_clip):
    score = tl.load(scores + sequence)
    # A NaN score stays NaN.
    return tl.where(score > score_clip, score_clip, tl.where(score < -score_clip, -score_clip, score))


@triton.jit
def _landing(score_index, sequence, first, last, seen):
    """Return the index of the score's token in the tile that begins at `first`; outside the tile if it is elsewhere."""
    if score_index is None:
        place = tl.where(seen, -1, last).to(tl.int64)
    else:
        place = tl.load(score_index + sequence) - first
    return place


@triton.jit
def _shape_rewards(logprob, ref, mask, score, landing, kl_coef, KL: tl.constexpr, BLOCK: tl.constexpr):
    """Return (rewards, KL) of one tile; zeros where the mask is False, so that a score at a masked token is dropped."""
    kl = tl.where(mask, kl_value(logprob - ref, KL), 0.0)
    reward = tl.where(tl.arange(0, BLOCK) == landing, -kl_coef * kl + score, -kl_coef * kl)
    return tl.where(mask, reward, 0.0), kl


@triton.jit(do_not_specialize=["n", "length"])
def _reward_moments_kernel(
    scores, logprobs, ref_logprobs, mask, score_index, cu_seqlens, parts, n, length, kl_coef, score_clip,
    KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    begin, length = span(cu_seqlens, n, length, sequence)
    score = _clipped_score(scores, sequence, score_clip)
    seen = False
    count, total, squares = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    tiles = tiles_of(length, BLOCK)
    for i in range(tiles):
        first = (tiles - 1 - i) * BLOCK
        room = tl.minimum(length - first, BLOCK)
        logprob = load_tile(logprobs + begin, first, room, BLOCK)
        ref = load_tile(ref_logprobs + begin, first, room, BLOCK)
        m = load_tile(mask + begin, first, room, BLOCK)
        last = last_action(m, BLOCK)
        landing = _landing(score_index, sequence, first, last, seen)
        reward, _ = _shape_rewards(logprob, ref, m, score, landing, kl_coef, KL, BLOCK)
        seen = seen | (last >= 0)
        tile_count, tile_total, tile_squares = moments(reward, m)
        count, total, squares = count + tile_count, total + tile_total, squares + tile_squares
    store_moments(parts, sequence, tl.num_programs(0).to(tl.int64), count, total, squares)


@triton.jit(do_not_specialize=["n", "length"])
def _kernel(
    scores, logprobs, ref_logprobs, values, mask, score_index, bootstrap, cu_seqlens, statistics,
    advantages, returns, rewards, kls, parts, n, length, kl_coef, score_clip,
    gamma, rest, decay, decay2, decay3, decay4, table,
    KL: tl.constexpr, SKIP_HOLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one sequence per program. `statistics` are for whitened rewards, `parts` for whitened advantages, else None."""
    sequence = tl.program_id(0).to(tl.int64)
    begin, length = span(cu_seqlens, n, length, sequence)
    score = _clipped_score(scores, sequence, score_clip)
    after = 0.0
    if bootstrap is not None:
        after = gamma * tl.load(bootstrap + sequence)
    if table is not None:
        rest, decay, decay2, decay3, decay4 = discounts_of(table, sequence)
    seen = False
    count, total, squares = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    tiles = tiles_of(length, BLOCK)
    for i in range(tiles):
        first = (tiles - 1 - i) * BLOCK
        room = tl.minimum(length - first, BLOCK)
        m = load_tile(mask + begin, first, room, BLOCK)
        logprob = load_tile(logprobs + begin, first, room, BLOCK)
        ref = load_tile(ref_logprobs + begin, first, room, BLOCK)
        value = load_tile(values + begin, first, room, BLOCK)
        last = last_action(m, BLOCK)
        landing = _landing(score_index, sequence, first, last, seen)
        reward, kl = _shape_rewards(logprob, ref, m, score, landing, kl_coef, KL, BLOCK)
        if statistics is not None:
            reward = whitened(reward, m, statistics)
        store_tile(kls + begin, first, room, kl, BLOCK)
        store_tile(rewards + begin, first, room, reward, BLOCK)
        advantage, after = gae_tile(
            reward, value, m, last, seen, after, rest, decay, decay2, decay3, decay4, SKIP_HOLES, BLOCK
        )
        seen = seen | (last >= 0)
        store_tile(advantages + begin, first, room, advantage, BLOCK)
        store_tile(returns + begin, first, room, tl.where(m, advantage + value, 0.0), BLOCK)
        if parts is not None:
            tile_count, tile_total, tile_squares = moments(advantage, m)
            count, total, squares = count + tile_count, total + tile_total, squares + tile_squares
    if parts is not None:
        store_moments(parts, sequence, tl.num_programs(0).to(tl.int64), count, total, squares)


def rollout_advantages(
    scores: Tensor,  # (B,)
    logprobs: Tensor,  # (B, T) or (N,)
    ref_logprobs: Tensor,  # (B, T) or (N,)
    values: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    kl_coef: float,
    kl_estimator: int,
    gamma: float,
    lam: float | Tensor,  # (B,) if a tensor, float32
    score_clip: float,
    score_index: Tensor | None,  # (B,), int64
    bootstrap: Tensor | None,  # (B,)
    skip_holes: bool,
    whiten_rewards: bool,
    whiten_advantages: bool,
    cu_seqlens: Tensor | None,  # (B + 1,), int32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantages, returns, rewards and KL; on a CPU the values of `cu_seqlens` are checked."""
    Sequences.of(logprobs, cu_seqlens).check_on_cpu(logprobs)
    advantages, returns, rewards, kl = (torch.empty_like(logprobs) for _ in range(4))
    n = logprobs.numel()
    b, t = scores.numel(), logprobs.shape[-1] if cu_seqlens is None else 0
    # Triton specializes integers, and compiles 1 as a constant: an int would compile a second kernel.
    kl_coef, score_clip = float(kl_coef), float(score_clip)
    tile = scan.ROLLOUT_K3_TILE if kl_estimator == K3.value else scan.ROLLOUT_TILE
    statistics = None
    parts = new_parts(b, logprobs) if whiten_rewards or whiten_advantages else None
    with torch.cuda.device_of(logprobs):
        if whiten_rewards:
            assert parts is not None
            _reward_moments_kernel[(b,)](
                scores, logprobs, ref_logprobs, mask, score_index, cu_seqlens, parts, n, t, kl_coef, score_clip,
                KL=kl_estimator, **tile,
            )  # fmt: skip
            statistics = statistics_of(parts, shift_mean=False, unbiased=True)
        _kernel[(b,)](
            scores, logprobs, ref_logprobs, values, mask, score_index, bootstrap, cu_seqlens, statistics,
            advantages, returns, rewards, kl, parts if whiten_advantages else None, n, t, kl_coef, score_clip,
            *discounts(gamma, lam),
            SKIP_HOLES=skip_holes, KL=kl_estimator, **tile,
        )  # fmt: skip
    if whiten_advantages:
        assert parts is not None
        whiten(advantages, mask, statistics_of(parts, shift_mean=True, unbiased=True), out=advantages)
    return advantages, returns, rewards, kl
