import torch
from torch import Tensor


def decode_attention(
    query: Tensor,  # (R, heads, D)
    keys: Tensor,  # (R, groups, C, D)
    values: Tensor,  # (R, groups, C, D)
    mask: Tensor,  # (R, C), bool
    scale: float,
) -> Tensor:  # (R, heads, D)
    """softmax(scale q k^T) v over the columns of the mask; heads share the keys of their group, so they go as its rows."""
    rows, heads, size = query.shape
    grouped = query.reshape(rows, keys.shape[1], -1, size) * scale
    # A column that is not allowed may hold anything: 0 * NaN is NaN.
    allowed = values.masked_fill(~mask[:, None, :, None], 0)
    with torch.autocast(query.device.type, enabled=False):  # which would round the factors
        logits = torch.matmul(grouped, keys.transpose(-1, -2)).masked_fill(~mask[:, None, None], -torch.inf)
        return torch.matmul(logits.softmax(-1), allowed).reshape(rows, heads, size)
