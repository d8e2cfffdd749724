"""Attention of sequences that grow by one token each, over a cache of keys and values."""

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
    """Return `softmax(scale q K^T) V` of one query per row over the columns where its mask is True, in the dtype of `query`.

    Query heads h of a group of `heads / groups` share its keys and values (grouped-query attention). A row's bits depend on
    what its own mask shows it and where, not on R, the other rows or C; columns that the mask hides are never read, and may
    hold anything. A row whose mask is all False is NaN. Keys and values may have any strides but the last. No gradient.

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
        raise ValueError(f"keys: got {groups} groups for {heads} heads of query, expected a divisor of them")
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
