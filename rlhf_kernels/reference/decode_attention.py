"""The definition of `decode_attention` in eager PyTorch."""

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,  # (R, heads, D)
    keys: Tensor,  # (R, groups, C, D)
    values: Tensor,  # (R, groups, C, D)
    mask: Tensor,  # (R, C), bool
    scale: float,
) -> Tensor:  # (R, heads, D)
    """Return `softmax(scale q k^T) v` over the unmasked columns; the heads of a group are rows of one product."""
    rows, heads, size = query.shape
    grouped = query.reshape(rows, keys.shape[1], heads // keys.shape[1], size) * scale
    # Masked columns may be NaN, and 0 * NaN would be NaN.
    allowed = values.masked_fill(~mask[:, None, :, None], 0)
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the factors
        logits = torch.matmul(grouped, keys.transpose(-1, -2)).masked_fill(~mask[:, None, None], -torch.inf)
        return torch.matmul(logits.softmax(-1), allowed).reshape(rows, heads, size)
