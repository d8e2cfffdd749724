"""Launcher of `torch.nn.attention.varlen` with FlashAttention-3 or -4, which can read pages; see `backend.why_no_varlen`.

**It has not run on a device yet**: a test checks the call against torch's signature and documentation.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def paged_attention(
    q: Tensor,  # (B, heads, D)
    k_pages: Tensor,  # (P, page size, groups, D)
    v_pages: Tensor,
    block_table: Tensor,  # (B, M), int32
    lengths: Tensor,  # (B,), int32
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Call `varlen_attn` with one split and a validated block table.

    With more splits torch chooses them from the batch, and a row's bits would depend on its batch. torch does not check the
    table: here unused entries are replaced by page 0, and a row with an invalid page or length returns NaN.
    """
    assert softcap == 0
    (pages, page_size), places = k_pages.shape[:2], block_table.shape[1]
    first, length = torch.arange(places, device=q.device) * page_size, lengths[:, None]
    counts = first < length
    if window:
        counts &= first + page_size > length - window
    exists = (block_table >= 0) & (block_table < pages)
    unsound = (counts & ~exists).any(1) | (lengths < 0) | (lengths > places * page_size)
    out = varlen_attn(
        q,
        k_pages,
        v_pages,
        torch.arange(len(q) + 1, dtype=torch.int32, device=q.device),
        None,
        1,
        places * page_size,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=q.shape[1] != k_pages.shape[2],
        seqused_k=lengths.clamp(0, places * page_size),
        block_table=block_table.where(counts & exists, 0),
        num_splits=1,
    )
    # The cast: `varlen_attn` returns a tuple only with `return_aux`.
    out = cast(Tensor, out).masked_fill((lengths == 0)[:, None, None], 0)
    return out.masked_fill(unsound[:, None, None], torch.nan)
