"""The definition of `paged_attention` in eager PyTorch."""

import torch
from torch import Tensor


def paged_attention(
    q: Tensor,  # (B, heads, D)
    k_pages: Tensor,  # (P, page size, groups, D)
    v_pages: Tensor,  # (P, page size, groups, D)
    block_table: Tensor,  # (B, M), int32
    lengths: Tensor,  # (B,), int32
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:  # (B, heads, D)
    """Return `softmax(scale * q k^T) v` over the tokens within length and window, with sums in float32 or wider."""
    (rows, heads, size), (pages, page_size, groups, _) = q.shape, k_pages.shape
    length, width = lengths.long()[:, None], block_table.shape[1] * page_size
    token = torch.arange(width, device=q.device)
    counts = token < length  # (B, M * page size)
    if window is not None:
        counts = counts & (token >= length - window)
    page = block_table.long().repeat_interleave(page_size, 1)
    unsound = ((page < 0) | (page >= pages)) & counts
    unsound = unsound.any(1) | (lengths < 0) | (lengths > width)
    page = torch.where(counts, page, 0).clamp(0, pages - 1)

    def read(x: Tensor) -> Tensor:  # (B, tokens, groups, D)
        return x[page, token % page_size].to(wide).masked_fill(~counts[:, :, None, None], 0)

    wide = torch.promote_types(q.dtype, torch.float32)
    query = q.reshape(rows, groups, heads // groups, size).to(wide) * scale
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the factors
        logits = torch.matmul(query, read(k_pages).permute(0, 2, 3, 1))
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        weights = logits.masked_fill(~counts[:, None, None], -torch.inf).softmax(-1)
        out = torch.matmul(weights, read(v_pages).permute(0, 2, 1, 3)).reshape(rows, heads, size)
    out = out.masked_fill((lengths == 0)[:, None, None], 0).masked_fill(unsound[:, None, None], torch.nan)
    return out.to(q.dtype)
