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

import triton
import triton.language as tl

BLOCK, NUM_WARPS = 2048, 8
"""Tokens of a tile, warps of a program. 8 tokens a thread in each of up to four inputs are enough loads in flight to cover
the latency of memory; the next tile is loaded while one is scanned. A larger tile would idle on short rows, whose scan costs
as much as that of a full tile."""


@triton.jit
def compose(later_decay, later_own, decay, own):
    """The map of a token after the map of those behind it: `U -> own + decay * (later_own + later_decay * U)`."""
    return later_decay * decay, own + decay * later_own


@triton.jit
def span(cu_seqlens, length, sequence):
    """Where a sequence begins, and its length, both int64."""
    if cu_seqlens is None:
        length = length.to(tl.int64)
        begin = sequence * length
    else:
        begin = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - begin
    return begin, length


@triton.jit
def lanes(BLOCK: tl.constexpr):
    """Places in a tile, the last one first: a scan runs upwards without the shuffles that turn a block round."""
    return BLOCK - 1 - tl.arange(0, BLOCK)


@triton.jit
def filled(first, length, BLOCK: tl.constexpr):
    """How many tokens the tile that begins at `first` has; none in front of the sequence."""
    return tl.where(first < 0, 0, tl.minimum(length - first, BLOCK)).to(tl.int32)


@triton.jit
def load_tile(x, at, count, BLOCK: tl.constexpr):
    """Tokens `at, ..., at + count - 1`, in the order of `lanes`, and zeros."""
    place = lanes(BLOCK)
    return tl.load(x + at + place, mask=place < count, other=0)


@triton.jit
def store_tile(x, at, count, tile, BLOCK: tl.constexpr):
    place = lanes(BLOCK)
    tl.store(x + at + place, tile, mask=place < count)


@triton.jit
def last_action(mask, BLOCK: tl.constexpr):
    """The place of the last action of a tile; -1 without one."""
    return tl.max(tl.where(mask, lanes(BLOCK), -1), 0)


@triton.jit
def gae_tile(reward, value, mask, last, seen, behind, gamma, decay, SKIP_HOLES: tl.constexpr, BLOCK: tl.constexpr):
    """(advantages, U of the tile's first token) of one tile.

    `decay` is γλ, `behind` is U behind the tile, `last` the place of its last action, `seen` whether a tile behind it has one.
    """
    step = mask
    if not SKIP_HOLES:
        # What lies behind the last action of all is padding, not holes.
        step = mask | seen | (lanes(BLOCK) < last)
    # Selected, not multiplied: a masked token may hold anything.
    own = tl.where(mask, decay * reward + (gamma - decay) * value, 0.0)
    decays, own = tl.associative_scan((tl.where(step, decay, 1.0), own), 0, compose)
    worth = own + decays * behind
    index = tl.arange(0, BLOCK)
    following = tl.gather(worth, tl.maximum(index - 1, 0), 0)
    following = tl.where(index == 0, behind, following)
    advantage = tl.where(mask, reward - value + following, 0.0)
    return advantage, tl.sum(tl.where(index == BLOCK - 1, worth, 0.0), 0)
