"""The recurrence of GAE as a scan, used by the kernels of `gae` and `rollout_advantages`.

Let U_{t+1} be the discounted value of everything after token t. Then `A_t = r_t - V_t + U_{t+1}` and `U_t = γ V_t + γλ A_t`, so

    U_t = γλ r_t + γ(1-λ) V_t + γλ U_{t+1}     at an action
    U_t = γλ U_{t+1}                           at a hole that decays (a step of reward 0 and value 0)
    U_t = U_{t+1}                              at a token that is skipped

Each token is one affine map of U, with or without holes, so no search for the value of the next action is needed. After the
last action U is γ times the bootstrap value. Composition of maps is associative, so a tile is one scan, and U is carried from
tile to tile.

One program processes a sequence, from its last tile to its first. Tiles have a fixed size and are counted from the start of
the sequence, and padding is an identity map. The bits of a row therefore do not depend on other rows, on the padding, or on
whether the row is packed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def registers(most: int) -> dict[str, int]:
    """Return the launch option that limits the registers per thread, so that several programs fit on a multiprocessor.

    Without a limit the compiler uses more registers to reorder loads. On HIP the limit is not set.
    """
    return {} if torch.version.hip else {"maxnreg": most}


# Tokens per tile and launch options. A thread has eight tokens, whose addresses and intermediate results fill its registers.
# A larger tile has more loads in flight, but a short row has to scan all of it.
GAE_TILE = {"BLOCK": 2048, "num_warps": 8, **registers(128)}
"""Two programs per multiprocessor. With few rows there is only one, so the next tile is loaded while a tile is scanned."""

ROLLOUT_TILE = {"BLOCK": 1024, "num_warps": 4, **registers(128)}
"""Four programs per multiprocessor, so that 512 rows are one wave on an H200."""

ROLLOUT_K3_TILE = {**ROLLOUT_TILE, **registers(168)}
"""More registers, because the float64 exponential of k3 does not fit in 128."""


@triton.jit
def compose(later_decay, later_own, decay, own):
    """Return the composition with the map of the later tokens: `U -> own + decay * (later_own + later_decay * U)`."""
    return later_decay * decay, own + decay * later_own


@triton.jit
def span(cu_seqlens, n, length, sequence):
    """Return where a sequence begins, int64, and its length, int32 (int64 only if a padded T needs it).

    Both are clamped to the `n` tokens for any `cu_seqlens`. Indices within a sequence have the type of its length: with 64
    bits, the compiler would keep an address per token and tensor during the whole loop, in twice the registers.
    """
    if cu_seqlens is None:
        begin = sequence * length
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sequence), 0).to(tl.int64), n)
        end = tl.minimum(tl.load(cu_seqlens + sequence + 1).to(tl.int64), n)
        length = tl.maximum(end - begin, 0).to(tl.int32)
    return begin, length


@triton.jit
def tiles_of(length, BLOCK: tl.constexpr):
    """Return the number of tiles, rounded up without a sum that could overflow."""
    return length // BLOCK + tl.where(length % BLOCK > 0, 1, 0)


@triton.jit
def filled(first, length, BLOCK: tl.constexpr):
    """Return the number of tokens of the tile that begins at `first`; 0 before the start of the sequence."""
    return tl.where(first < 0, 0, tl.minimum(length - first, BLOCK))


@triton.jit
def load_tile(x, first, count, BLOCK: tl.constexpr):
    """Load tokens `first, ..., first + count - 1` of the sequence at `x`, then zeros."""
    place = tl.arange(0, BLOCK)
    return tl.load(x + (first + place), mask=place < count, other=0)


@triton.jit
def store_tile(x, first, count, tile, BLOCK: tl.constexpr):
    """Store the first `count` entries of a tile as tokens `first, ...` of the sequence at `x`."""
    place = tl.arange(0, BLOCK)
    tl.store(x + (first + place), tile, mask=place < count)


@triton.jit
def last_action(mask, BLOCK: tl.constexpr):
    """Return the index of the last action in a tile; -1 without one."""
    return tl.max(tl.where(mask, tl.arange(0, BLOCK), -1), 0)


@triton.jit
def _columns(x, BLOCK: tl.constexpr):
    """Split a block into four, so that one thread holds a run of four tokens."""
    even, odd = tl.split(tl.reshape(x, [BLOCK // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _block(x0, x1, x2, x3, BLOCK: tl.constexpr):
    """Join four blocks, the inverse of `_columns`."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [BLOCK])


@triton.jit
def _step(own, on, decay, later):
    """Return `own + decay * later` where a token counts as a step, `own + later` elsewhere."""
    return own + tl.where(on, decay, 1.0) * later


@triton.jit
def _power(count, decay, decay2, decay3, decay4):
    """Return decay^count for a count of 0 to 4."""
    few = tl.where(count == 0, 1.0, tl.where(count == 1, decay, decay2))
    return tl.where(count == 3, decay3, tl.where(count == 4, decay4, few))


def discounts(gamma: float, lam: float | Tensor) -> tuple[float | Tensor | None, ...]:
    """Return γ, γ - γλ, the powers 1 to 4 of γλ, and None.

    They are computed in float64, and each is rounded once when it is passed to a kernel. For one λ per sequence the last
    result is the table (B, 5) of all but γ, float32, and the numbers that it replaces are 0.
    """
    gamma = float(gamma)
    if isinstance(lam, Tensor):
        decays = gamma * lam.double()
        table = torch.stack((gamma - decays, decays, decays**2, decays**3, decays**4), 1).float()
        return gamma, 0.0, 0.0, 0.0, 0.0, 0.0, table
    decay = float(gamma * lam)
    return gamma, gamma - decay, decay, decay**2, decay**3, decay**4, None


@triton.jit
def discounts_of(table, sequence):
    """Load γ - γλ and the powers 1 to 4 of γλ of one sequence from the table of `discounts`."""
    row = table + 5 * sequence
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def tile_steps(mask, last, seen, SKIP_HOLES: tl.constexpr, BLOCK: tl.constexpr):
    """Return which tokens of a tile count as steps; `last` and `seen` as in `gae_tile`."""
    step = mask
    if not SKIP_HOLES:
        # Tokens after the last action of the sequence are padding, not holes.
        step = mask | seen | (tl.arange(0, BLOCK) < last)
    return step


@triton.jit
def _runs(reward, value, mask, step, rest, decay, decay2, decay3, decay4, BLOCK: tl.constexpr):
    """Return what tokens 1 to 3 of each run of four add to U, whether they are steps, and the run's map: decay and sum."""
    # `where` instead of a product with the mask: a masked token can hold NaN.
    own = tl.where(mask, decay * reward + rest * value, 0.0)
    o0, o1, o2, o3 = _columns(own, BLOCK)
    s0, s1, s2, s3 = _columns(step.to(tl.int32), BLOCK)
    o = _step(o0, s0 != 0, decay, _step(o1, s1 != 0, decay, _step(o2, s2 != 0, decay, o3)))
    return o1, o2, o3, s1, s2, s3, _power(s0 + s1 + s2 + s3, decay, decay2, decay3, decay4), o


@triton.jit
def _first(x, BLOCK: tl.constexpr):
    """Return the number of a tile's first run."""
    return tl.sum(tl.where(tl.arange(0, BLOCK // 4) == 0, x, 0.0), 0)


@triton.jit
def tile_map(
    reward, value, mask, last, rest, decay, decay2, decay3, decay4, SKIP_HOLES: tl.constexpr, BLOCK: tl.constexpr
):
    """Return (decay, sum) of the map of a tile without actions after it, with the bits that `gae_tile` computes.

    Tokens after the tile's last action add nothing to U. With actions in a later tile the sum is therefore the same, and for
    holes that decay the decay is `whole_decay`.
    """
    step = tile_steps(mask, last, False, SKIP_HOLES, BLOCK)
    _, _, _, _, _, _, power, o = _runs(reward, value, mask, step, rest, decay, decay2, decay3, decay4, BLOCK)
    d, o = tl.associative_scan((power, o), 0, compose, reverse=True)
    return _first(d, BLOCK), _first(o, BLOCK)


@triton.jit
def whole_decay(decay4, BLOCK: tl.constexpr):
    """Return the decay of a tile in which every token is a step, with the bits that `gae_tile` computes."""
    none = tl.zeros([BLOCK // 4], tl.float32)
    d, _ = tl.associative_scan((none + decay4, none), 0, compose, reverse=True)
    return _first(d, BLOCK)


@triton.jit
def gae_tile(
    reward, value, mask, last, seen, after, rest, decay, decay2, decay3, decay4,
    SKIP_HOLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return (advantages, U at the tile's first token) of one tile.

    `rest` and the powers of γλ come from `discounts`. `after` is U after the tile, `last` the index of the tile's last action,
    and `seen` whether a later tile has an action. A run of four tokens is composed with γλ to the power of its steps, so that
    the rounding error of γλ accumulates per run and not per token: 75 such errors are as large as the error of all sums.
    """
    step = tile_steps(mask, last, seen, SKIP_HOLES, BLOCK)
    o1, o2, o3, s1, s2, s3, power, o = _runs(reward, value, mask, step, rest, decay, decay2, decay3, decay4, BLOCK)
    d, o = tl.associative_scan((power, o), 0, compose, reverse=True)
    worth = o + d * after
    run = tl.arange(0, BLOCK // 4)
    u3 = tl.where(run == BLOCK // 4 - 1, after, tl.gather(worth, tl.minimum(run + 1, BLOCK // 4 - 1), 0))
    u2 = _step(o3, s3 != 0, decay, u3)
    u1 = _step(o2, s2 != 0, decay, u2)
    u0 = _step(o1, s1 != 0, decay, u1)
    following = _block(u0, u1, u2, u3, BLOCK)
    advantage = tl.where(mask, reward - value + following, 0.0)
    return advantage, _first(worth, BLOCK)
