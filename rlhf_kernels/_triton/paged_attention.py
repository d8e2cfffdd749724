# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# triton.jit compiles the functions it decorates and changes how they are called; a checker reads them as Python.
"""Attention of one query per sequence over pages: one launch computes splits of the keys, a second adds them in order.

A program processes up to ROWS heads that share keys, and one split of the sequence's tokens. The splits of a sequence depend
only on its length and the window, so its bits do not depend on its batch. The kernel is bound by memory, and reads keys and
values once.

Legend: B sequences, P pages, M entries per row of the block table, D size of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import LOG2E, tanh

SPLITS, SPLIT_TOKENS = 64, 512
"""Maximum splits per sequence, and minimum tokens per split. A short sequence has one split, so no program has little work."""
ROWS = 16  # the smallest side of a matrix product
COMBINE = {"num_warps": 1}
TILE_BYTES = 16384


@triton.jit
def _spans(length, window, HAS_WINDOW: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """Return the first token that counts, the tile that holds it, the tiles per split and the number of splits."""
    first = tl.zeros_like(length)
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    start = first // TILE
    tiles = tl.cdiv(length, TILE) - start
    each = tl.maximum(tl.cdiv(tiles, SPLITS), LEAST)
    return first, start, each, tl.cdiv(tiles, each)


@triton.jit
def _length(lengths, row, tokens):
    """Return (length, True), or (0, False) if the length is negative or exceeds the `tokens` of a row of the table."""
    length = tl.load(lengths + row)
    sound = (length >= 0) & (length <= tokens)
    return tl.where(sound, length, 0), sound


@triton.jit
def _product(a, b, WIDEN: tl.constexpr):
    """Return the matrix product: float32 sums of exact products, also for float32 operands."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _logits(query, k, scale, softcap, HAS_CAP: tl.constexpr, WIDEN: tl.constexpr):
    """Return the logits times log2(e), in float32."""
    logits = _product(query, tl.trans(k), WIDEN)
    if HAS_CAP:
        logits = softcap * tanh(logits * (scale / softcap)) * LOG2E
    else:
        logits = logits * (scale * LOG2E)
    return logits


@triton.jit(do_not_specialize=["pages", "places", "room", "window"])
def _attend(
    q, k_pages, v_pages, block_table, lengths,  # (B, heads, D), (P, PAGE, groups, D) twice, (B, M), (B,)
    sums, tops, masses,  # (B, heads, room, D), (B, heads, room) twice, float32
    pages, places, room, heads, per_group, q_row, q_head, k_page, k_token, k_group, v_page, v_token, v_group,
    scale, window, softcap,
    HEAD: tl.constexpr, PAGE: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, WIDEN: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    parts = tl.cdiv(per_group, ROWS)
    group = (tl.program_id(1) // parts).to(tl.int64)
    member = tl.program_id(1) % parts * ROWS + tl.arange(0, ROWS)
    length, _ = _length(lengths, row, places * PAGE)
    first, start, each, live = _spans(length, window, HAS_WINDOW, TILE, SPLITS, LEAST)
    if split < live:
        d = tl.arange(0, BLOCK_D)
        head = group * per_group + member
        holds = (member < per_group)[:, None] & (d < HEAD)[None, :]
        query = tl.load(q + row * q_row + head[:, None] * q_head + d[None, :], holds, other=0.0)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS, BLOCK_D], tl.float32)
        begin = (start + split * each) * TILE
        for at in range(begin, tl.minimum(begin + each * TILE, length), TILE):
            token = at + tl.arange(0, TILE)
            counts = (token >= first) & (token < length)
            page = tl.load(block_table + row * places + token // PAGE, counts, other=0).to(tl.int64)
            exists = (page >= 0) & (page < pages)
            read = (counts & exists)[:, None] & (d < HEAD)[None, :]
            within = (token % PAGE).to(tl.int64)
            k_at = page * k_page + within * k_token + group * k_group
            k = tl.load(k_pages + k_at[:, None] + d[None, :], read, other=0.0)
            logits = _logits(query, k, scale, softcap, HAS_CAP, WIDEN)
            # A page that does not exist is not read, and makes its row NaN.
            logits = tl.where(exists[None, :], logits, float("nan"))
            logits = tl.where(counts[None, :], logits, float("-inf"))
            higher = tl.maximum(top, tl.max(logits, 1))
            weight = tl.exp2(logits - higher[:, None])
            shrink = tl.exp2(top - higher)
            v_at = page * v_page + within * v_token + group * v_group
            v = tl.load(v_pages + v_at[:, None] + d[None, :], read, other=0.0)
            total = total * shrink[:, None] + _product(weight.to(v.dtype), v, WIDEN)
            mass = mass * shrink + tl.sum(weight, 1)
            top = higher
        out = (row * heads + head) * room + split
        tl.store(sums + out[:, None] * HEAD + d[None, :], total, holds)
        tl.store(tops + out, top, member < per_group)
        tl.store(masses + out, mass, member < per_group)


@triton.jit(do_not_specialize=["places", "room", "window"])
def _combine(
    sums, tops, masses, lengths, out, places, room, window,  # out: (B, heads, D)
    HEAD: tl.constexpr, PAGE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row * tl.num_programs(1) + tl.program_id(1)
    length, sound = _length(lengths, row, places * PAGE)
    _, _, _, live = _spans(length, window, HAS_WINDOW, TILE, SPLITS, LEAST)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    at = place * room
    top = tl.max(tl.load(tops + at + split, split < live, other=float("-inf")))
    mass, total = 0.0, tl.zeros([BLOCK_D], tl.float32)
    # Added one by one, because the order of a tree reduction would depend on how many splits are allocated.
    for part in range(live):
        weight = tl.exp2(tl.load(tops + at + part) - top)
        mass += weight * tl.load(masses + at + part)
        total += weight * tl.load(sums + (at + part) * HEAD + d, d < HEAD, other=0.0)
    result = tl.where(live > 0, total / tl.where(live > 0, mass, 1.0), 0.0)
    result = tl.where(sound, result, float("nan"))
    tl.store(out + place * HEAD + d, result.to(out.dtype.element_ty), d < HEAD)


def tile_of(size: int, itemsize: int) -> tuple[int, int]:
    """Return the tokens per tile, 16 to 128, and the number of warps.

    A tile of keys has 16 KiB and 8 warps. Half-precision heads of at least 256 bytes have tiles of 32 KiB and 4 warps, which
    is faster by a quarter for long sequences; other heads would spill with these.
    """
    row = triton.next_power_of_2(max(16, size)) * itemsize
    wide = itemsize == 2 and row >= 256
    return max(16, min(128, TILE_BYTES * (1 + wide) // row)), 4 if wide else 8


def splits_of(tokens: int, tile: int) -> int:
    """Return the largest number of splits of a sequence of at most `tokens`, for which partial sums are allocated."""
    return max(1, min(SPLITS, -(-tokens // max(tile, SPLIT_TOKENS))))


def paged_attention(
    q: Tensor,  # (B, heads, D), unit stride along D
    k_pages: Tensor,  # (P, page size, groups, D), unit stride along D
    v_pages: Tensor,
    block_table: Tensor,  # (B, M), int32
    lengths: Tensor,  # (B,), int32
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Return the attention of one query per sequence, in two launches."""
    (b, heads, size), (pages, page_size, groups, _) = q.shape, k_pages.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    (tile, warps), places, per_group = tile_of(size, q.element_size()), block_table.shape[1], heads // groups
    # A window that does not start at a tile boundary covers one more tile.
    tokens = min(places * page_size, window + tile) if window else places * page_size
    room = splits_of(tokens, tile)
    sums = torch.empty(b, heads, room, size, dtype=torch.float32, device=q.device)
    tops, masses = (torch.empty(b, heads, room, dtype=torch.float32, device=q.device) for _ in range(2))
    cuts = {
        "TILE": tile,
        "SPLITS": SPLITS,
        "LEAST": SPLIT_TOKENS // tile,
        "BLOCK_D": triton.next_power_of_2(max(16, size)),
    }
    # Triton's interpreter multiplies the bits of bfloat16 as integers, so it gets float32, which holds the products exactly.
    widen = triton.knobs.runtime.interpret and q.dtype == torch.bfloat16
    shape = {"HEAD": size, "PAGE": page_size, "HAS_WINDOW": window > 0, **cuts}
    with torch.cuda.device_of(q):
        _attend[(b, groups * triton.cdiv(per_group, ROWS), room)](
            q, k_pages, v_pages, block_table, lengths, sums, tops, masses, pages, places, room, heads, per_group,
            *q.stride()[:2], *k_pages.stride()[:3], *v_pages.stride()[:3], scale, window, softcap,
            HAS_CAP=softcap > 0, WIDEN=widen, ROWS=ROWS, **shape, num_warps=warps, num_stages=2,
        )  # fmt: skip
        _combine[(b, heads)](sums, tops, masses, lengths, out, places, room, window, **shape, **COMBINE)
    return out
