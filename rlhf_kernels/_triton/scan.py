"""The recurrence of GAE as a scan: what the kernels of `gae` and `rollout_advantages` share.

With U the worth of all that follows a token, `A_t = r_t - V_t + U_{t+1}` and `U_t = γ V_t + γλ A_t`, so

    U_t = γλ r_t + γ(1-λ) V_t + γλ U_{t+1}     at an action
    U_t = γλ U_{t+1}                           at a hole that decays (a step of reward 0 and value 0)
    U_t = U_{t+1}                              at a token that is stepped over

which is one affine map of U a token, whatever the holes: no search for the value of the next action. Behind the last action
U is γ times the bootstrap. Maps compose in any grouping, so a tile is one scan, and U goes from tile to tile.

One program owns a sequence and walks its tiles from the last to the first. They have a fixed size and are counted from the
sequence's start, and padding adds maps that change nothing: a row's bits depend neither on other rows nor on the padding, and
a packed row has the same.
"""

import torch
import triton
import triton.language as tl


def registers(most: int) -> dict[str, int]:
    """Launch option: registers a thread, so that several programs fit on a multiprocessor; left alone, the compiler spends
    them on the order of its loads."""
    return {} if torch.version.hip else {"maxnreg": most}


# Tokens of a tile and how a program runs. A thread has eight tokens, whose addresses and intermediate results fill registers.
# A larger tile has more loads in flight, but a short row pays for the scan of all of it.
GAE_TILE = {"BLOCK": 2048, "num_warps": 8, **registers(128)}
"""Two programs a multiprocessor. Few rows leave it to one, so the next tile is loaded while a tile is scanned."""

ROLLOUT_TILE = {"BLOCK": 1024, "num_warps": 4, **registers(128)}
"""Four programs a multiprocessor, so that 512 rows are one wave on an H200."""

ROLLOUT_K3_TILE = {**ROLLOUT_TILE, **registers(168)}
"""The exponential of k3, in float64, has no room in fewer registers."""


@triton.jit
def compose(later_decay, later_own, decay, own):
    """The map of tokens after the map of those behind them: `U -> own + decay * (later_own + later_decay * U)`."""
    return later_decay * decay, own + decay * later_own


@triton.jit
def span(cu_seqlens, n, length, sequence):
    """Where a sequence begins, int64, and its length, int32 (int64 only where a padded T is that long); inside the `n`
    tokens whatever `cu_seqlens` says.

    Places inside a sequence are counted as its length is: in 64 bits, the compiler would keep an address for each token and
    tensor over the whole walk, in twice the registers.
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
    """Rounded up without a sum that might overflow."""
    return length // BLOCK + tl.where(length % BLOCK > 0, 1, 0)


@triton.jit
def filled(first, length, BLOCK: tl.constexpr):
    """How many tokens the tile that begins at `first` has; none in front of the sequence."""
    return tl.where(first < 0, 0, tl.minimum(length - first, BLOCK))


@triton.jit
def load_tile(x, first, count, BLOCK: tl.constexpr):
    """Tokens `first, ..., first + count - 1` of the sequence at `x`, then zeros."""
    place = tl.arange(0, BLOCK)
    return tl.load(x + (first + place), mask=place < count, other=0)


@triton.jit
def store_tile(x, first, count, tile, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(x + (first + place), tile, mask=place < count)


@triton.jit
def last_action(mask, BLOCK: tl.constexpr):
    """The place of the last action of a tile; -1 without one."""
    return tl.max(tl.where(mask, tl.arange(0, BLOCK), -1), 0)


@triton.jit
def _columns(x, BLOCK: tl.constexpr):
    """A block as four: each run of four tokens becomes one thread's."""
    even, odd = tl.split(tl.reshape(x, [BLOCK // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _block(x0, x1, x2, x3, BLOCK: tl.constexpr):
    """The inverse of `_columns`."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [BLOCK])


@triton.jit
def _step(own, on, decay, later):
    """`own + decay * later` where a token counts, `own + later` elsewhere."""
    return own + tl.where(on, decay, 1.0) * later


@triton.jit
def _power(count, decay, decay2, decay3, decay4):
    """decay^count; count is 0 to 4."""
    few = tl.where(count == 0, 1.0, tl.where(count == 1, decay, decay2))
    return tl.where(count == 3, decay3, tl.where(count == 4, decay4, few))


def discounts(gamma: float, lam: float) -> tuple[float, ...]:
    """What the kernels are given: γ, γ - γλ, and γλ to the powers of 1 to 4, each rounded once on its way."""
    gamma, decay = float(gamma), float(gamma * lam)
    return gamma, gamma - decay, decay, decay**2, decay**3, decay**4


@triton.jit
def gae_tile(
    reward, value, mask, last, seen, behind, rest, decay, decay2, decay3, decay4,
    SKIP_HOLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(advantages, U of the tile's first token) of one tile.

    `rest` and the powers of γλ are those of `discounts`, `behind` is U behind the tile, `last` the place of its last action,
    `seen` whether a tile behind it has one. Runs of four tokens are composed with γλ to the number of their steps, so that
    what its rounding is off by grows with runs and not with tokens: 75 of it cost as much as all sums do.
    """
    step = mask
    if not SKIP_HOLES:
        # What lies behind the last action of all is padding, not holes.
        step = mask | seen | (tl.arange(0, BLOCK) < last)
    # Selected, not multiplied: a masked token may hold anything.
    own = tl.where(mask, decay * reward + rest * value, 0.0)
    o0, o1, o2, o3 = _columns(own, BLOCK)
    s0, s1, s2, s3 = _columns(step.to(tl.int32), BLOCK)
    o = _step(o0, s0 != 0, decay, _step(o1, s1 != 0, decay, _step(o2, s2 != 0, decay, o3)))
    d, o = tl.associative_scan((_power(s0 + s1 + s2 + s3, decay, decay2, decay3, decay4), o), 0, compose, reverse=True)
    worth = o + d * behind
    run = tl.arange(0, BLOCK // 4)
    u3 = tl.where(run == BLOCK // 4 - 1, behind, tl.gather(worth, tl.minimum(run + 1, BLOCK // 4 - 1), 0))
    u2 = _step(o3, s3 != 0, decay, u3)
    u1 = _step(o2, s2 != 0, decay, u2)
    u0 = _step(o1, s1 != 0, decay, u1)
    following = _block(u0, u1, u2, u3, BLOCK)
    advantage = tl.where(mask, reward - value + following, 0.0)
    return advantage, tl.sum(tl.where(run == 0, worth, 0.0), 0)
