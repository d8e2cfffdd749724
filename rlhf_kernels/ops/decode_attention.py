"""Attention of one query per row over cached keys and values: a decode step with a contiguous KV cache."""

from torch import Tensor

from ..backend import define, kernels, resolve
from . import checks


def decode_attention(
    query: Tensor,  # (R, heads, D)
    keys: Tensor,  # (R, groups, C, D)
    values: Tensor,  # (R, groups, C, D)
    mask: Tensor,  # (R, C), bool
    *,
    scale: float | None = None,  # default: D ** -0.5
    backend: str = "auto",
) -> Tensor:  # (R, heads, D)
    """Return `softmax(scale q K^T) V` of one query per row, over the columns where the row's mask is True.

    where R are rows, C columns of the cache and D the head size. The result has the dtype of `query`. `heads / groups`
    consecutive query heads share the keys and values of one group (grouped-query attention). A row whose mask is all
    False gives NaN. Keys and values may have any strides; they are copied if the last stride is not 1. There is no
    gradient.

    The result of a row is bit-identical for any R, any C and any other rows: it depends only on the row's query and on
    its unmasked columns and their positions. Masked columns do not affect it, even if they are NaN.

    Source: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023 (grouped-query attention), section 2.2.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit, with the argument's name.
    """
    checks.floating("query", query, dims=(3,), what="[R, heads, D]")
    rows, heads, size = query.shape
    checks.floating("keys", keys, dims=(4,), what="[R, groups, C, D]")
    groups, width = keys.shape[1:3]
    like: checks.Like = {"like": query, "expected": (rows, groups, width, size), "what": "[R, groups, C, D]"}
    checks.tensor("keys", keys, **like, dtypes=(query.dtype,))
    checks.tensor("values", values, **like, dtypes=(query.dtype,))
    checks.mask("mask", mask, like=query, expected=(rows, width), what="[R, C]")
    if groups == 0 or heads % groups:
        raise ValueError(
            f"keys: got {groups} groups for {heads} heads of query, expected a divisor of the number of heads"
        )
    checks.number("scale", scale, optional=True)
    factor = size**-0.5 if scale is None else float(scale)
    chosen = resolve("decode_attention", backend, query)
    if chosen == "reference":
        from .. import reference

        return reference.decode_attention(query.detach(), keys.detach(), values.detach(), mask, factor)
    return _op(query, keys, values, mask, factor, chosen)


def _run(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, backend: str) -> Tensor:
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    return kernels(backend).decode_attention(query.contiguous(), keys, values, mask.contiguous(), scale)


def _fake(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


_op = define(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor mask, float scale, str backend) -> Tensor",
    run=_run,
    fake=_fake,
)
