# pyright: reportArgumentType=false, reportOperatorIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Advantages and value targets of padded or packed sequences.

One program processes a sequence. A trial, `gae_split`, uses one program per tile for a few long rows: the first launch computes
the map of each tile, and the second one carries U through the maps of the later tiles, in the order of the one program.
Results therefore have the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._options import ACTIVE_TRIALS
from ..launch_args import Sequences
from . import scan
from .scan import (
    discounts,
    discounts_of,
    filled,
    gae_tile,
    last_action,
    load_tile,
    registers,
    span,
    store_tile,
    tile_map,
    tiles_of,
    whole_decay,
)

FEWEST_TILES = 8
"""Tiles of the shortest row that is split. With fewer, a second launch costs more than it saves."""
ROW_SHARE = 0.75
"""Rows per multiprocessor up to which they are split. With more, one program per row reads less and is as parallel."""
MULTIPROCESSORS = 132
"""Assumed where there is no device: those of an H200."""
GROUP = 16
"""Maps that a program of the second launch loads together; a row of 131,072 tokens has 64."""
MAPS, CARRY = registers(64), registers(80)
"""Launch options of the two launches: four and three programs per multiprocessor.

Tile and warps are those of `scan.GAE_TILE`, because the bits depend on them.
"""


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


@triton.jit(do_not_specialize=["length", "tiles"])
def _maps_kernel(
    rewards, values, mask, maps, wholes, length, tiles,  # maps: (3, B, tiles) float32, wholes: (B,)
    rest, decay, decay2, decay3, decay4, table, SKIP_HOLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the decay and the sum of each tile's map, and whether it has an action; one program per tile."""
    place, n = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    sequence, tile = place // tiles, (place % tiles).to(tl.int32)
    begin, length = span(None, 0, length, sequence)
    if table is not None:
        rest, decay, decay2, decay3, decay4 = discounts_of(table, sequence)
    first = tile * BLOCK
    count = filled(first, length, BLOCK)
    reward = load_tile(rewards + begin, first, count, BLOCK)
    value = load_tile(values + begin, first, count, BLOCK)
    m = load_tile(mask + begin, first, count, BLOCK)
    last = last_action(m, BLOCK)
    d, o = tile_map(reward, value, m, last, rest, decay, decay2, decay3, decay4, SKIP_HOLES, BLOCK)
    tl.store(maps + place, d)
    tl.store(maps + n + place, o)
    tl.store(maps + 2 * n + place, tl.where(last >= 0, 1.0, 0.0))
    if tile == 0:
        tl.store(wholes + sequence, whole_decay(decay4, BLOCK))


@triton.jit
def _carried(maps, n, whole, begin, tile, tiles, after, SKIP_HOLES: tl.constexpr, GROUP: tl.constexpr):
    """Return U after a tile, and whether a later tile has an action. The loads of a group of maps are in flight together."""
    seen = False
    for group in range(tl.cdiv(tiles - 1 - tile, GROUP)):
        for k in tl.static_range(GROUP):  # pyright: ignore[reportGeneralTypeIssues]
            later = tiles - 1 - group * GROUP - k
            exists = later > tile
            at = maps + begin + later
            d = tl.load(at, mask=exists, other=1.0)
            o = tl.load(at + n, mask=exists, other=0.0)
            acts = tl.load(at + 2 * n, mask=exists, other=0.0) != 0
            if not SKIP_HOLES:
                d = tl.where(seen, whole, d)
            after = tl.where(exists, o + d * after, after)
            seen = seen | acts
    return after, seen


@triton.jit(do_not_specialize=["length", "tiles"])
def _carry_kernel(
    rewards, values, mask, bootstrap, maps, wholes, advantages, returns, length, tiles,
    gamma, rest, decay, decay2, decay3, decay4, table,
    SKIP_HOLES: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile per program, in reverse order, so that the tiles that were read last are still in the L2 cache."""
    n = tl.num_programs(0).to(tl.int64)
    place = n - 1 - tl.program_id(0)
    sequence, tile = place // tiles, (place % tiles).to(tl.int32)
    begin, length = span(None, 0, length, sequence)
    after, whole = 0.0, 1.0
    if bootstrap is not None:
        after = gamma * tl.load(bootstrap + sequence)
    if not SKIP_HOLES:
        whole = tl.load(wholes + sequence)
    after, seen = _carried(maps, n, whole, sequence * tiles, tile, tiles, after, SKIP_HOLES, GROUP)
    if table is not None:
        rest, decay, decay2, decay3, decay4 = discounts_of(table, sequence)
    first = tile * BLOCK
    count = filled(first, length, BLOCK)
    reward = load_tile(rewards + begin, first, count, BLOCK)
    value = load_tile(values + begin, first, count, BLOCK)
    m = load_tile(mask + begin, first, count, BLOCK)
    last = last_action(m, BLOCK)
    advantage, _ = gae_tile(reward, value, m, last, seen, after, rest, decay, decay2, decay3, decay4, SKIP_HOLES, BLOCK)
    store_tile(advantages + begin, first, count, advantage, BLOCK)
    store_tile(returns + begin, first, count, tl.where(m, advantage + value, 0.0), BLOCK)


def splits(b: int, t: int, device: torch.device) -> bool:
    """Return whether `b` padded rows of `t` tokens are few and long enough that several programs per row are faster."""
    many = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS
    return "gae_split" in ACTIVE_TRIALS and b <= ROW_SHARE * many and t >= FEWEST_TILES * scan.GAE_TILE["BLOCK"]


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
    """Return advantages and returns; on a CPU the values of `cu_seqlens` are checked."""
    Sequences.of(rewards, cu_seqlens).check_on_cpu(rewards)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    b, t = rewards.shape if cu_seqlens is None else (cu_seqlens.numel() - 1, 0)
    if b and cu_seqlens is None and splits(b, t, rewards.device):
        _gae_of_tiles(rewards, values, mask, discounts(gamma, lam), bootstrap, skip_holes, advantages, returns)
        return advantages, returns
    with torch.cuda.device_of(rewards):
        _kernel[(b,)](
            rewards, values, mask, bootstrap, cu_seqlens, advantages, returns, rewards.numel(), t,
            *discounts(gamma, lam),
            SKIP_HOLES=skip_holes, **scan.GAE_TILE,
        )  # fmt: skip
    return advantages, returns


def _gae_of_tiles(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T), bool
    numbers: tuple[float | Tensor | None, ...],  # of `discounts`
    bootstrap: Tensor | None,  # (B,)
    skip_holes: bool,
    advantages: Tensor,  # (B, T), written
    returns: Tensor,  # (B, T), written
) -> None:
    """Write advantages and returns in two launches, one program per tile; 26 bytes per token instead of 17."""
    b, t = rewards.shape
    tiles = triton.cdiv(t, scan.GAE_TILE["BLOCK"])
    maps = torch.empty(3, b, tiles, dtype=torch.float32, device=rewards.device)
    wholes = torch.empty(b, dtype=torch.float32, device=rewards.device)
    with torch.cuda.device_of(rewards):
        _maps_kernel[(b * tiles,)](
            rewards, values, mask, maps, wholes, t, tiles, *numbers[1:],
            SKIP_HOLES=skip_holes, **scan.GAE_TILE | MAPS,
        )  # fmt: skip
        _carry_kernel[(b * tiles,)](
            rewards, values, mask, bootstrap, maps, wholes, advantages, returns, t, tiles, *numbers,
            SKIP_HOLES=skip_holes, GROUP=GROUP, **scan.GAE_TILE | CARRY,
        )  # fmt: skip
