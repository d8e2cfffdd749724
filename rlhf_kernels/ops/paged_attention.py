"""Attention of one query per sequence over keys and values in pages: the decode step of a rollout with a paged KV cache.

This op is not part of PPO. A rollout whose KV pages share memory with the gradients needs attention that reads the
pages directly. Its result must not depend on the batch, or a sampled log-prob would depend on the other sequences in
the batch. Torch provides this only if FlashAttention-3 or -4 is installed and activated (see `backend.why_no_varlen`).
"""

import torch
from torch import Tensor

from ..backend import define, kernels, resolve
from . import checks


def paged_attention(
    q: Tensor,  # (B, heads, D)
    k_pages: Tensor,  # (P, page size, groups, D)
    v_pages: Tensor,  # (P, page size, groups, D)
    block_table: Tensor,  # (B, M), int32
    lengths: Tensor,  # (B,), int32
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:  # (B, heads, D)
    """Return `softmax(scale * q k^T) v` for one query per sequence, over its last `window` tokens (None: all tokens).

    where B are sequences, D the head size, P pages, and M pages per sequence in the block table. The key of token t of
    sequence b is `k_pages[block_table[b, t // page size], t % page size]`. `lengths[b]` is the number of tokens
    including the query's token. `heads / groups` consecutive query heads share the keys and values of one group.
    `scale` is `D ** -0.5` by default. With `softcap`, a logit s becomes `softcap * tanh(s / softcap)`.

    The result has the dtype of `q`; sums are float32 or wider. A sequence of length 0 gives zeros. Tokens beyond the
    length or before the window, and their pages and entries of the block table, do not affect the result, even if they
    are NaN or invalid. The result of a sequence is bit-identical in any batch. There is no gradient.

    A page stores the keys of all groups of a token next to each other, so that a token is written as one block and a
    head's key is read as D contiguous numbers. `torch.nn.attention.varlen` uses the same layout.

    Source: Kwon et al. 2023 (paged attention); Dao et al. 2023 (flash-decoding).

    Raises:
        ValueError: a shape, dtype, device or range that does not fit, with the argument's name. On CPU also a page that does
            not exist and a length beyond the block table; on other devices the result of such a sequence is NaN.
    """
    checks.floating("q", q, dims=(3,), what="[B, heads, D]")
    b, heads, size = q.shape
    checks.floating("k_pages", k_pages, dims=(4,), what="[P, page size, groups, D]")
    pages, page_size, groups, _ = k_pages.shape
    if groups == 0 or heads % groups or pages == 0 or page_size == 0:
        what = f"P >= 1, page size >= 1, and a number of groups that divides q's {heads} heads"
        raise ValueError(f"k_pages: got shape {checks.shape(k_pages)}, expected {what}")
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        expected = (pages, page_size, groups, size)
        checks.tensor(name, x, like=q, expected=expected, what="[P, page size, groups, D]", dtypes=(q.dtype,))
    int32 = (torch.int32,)
    checks.tensor("lengths", lengths, like=q, expected=(b,), what="one length per sequence", dtypes=int32)
    # A caller may pass something else than a tensor.
    given = isinstance(block_table, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
    places = block_table.shape[-1] if given and block_table.dim() else 0
    checks.tensor("block_table", block_table, like=q, expected=(b, places), what="[B, M]", dtypes=int32)
    if not 0 < places * page_size < 1 << 31:
        raise ValueError(f"block_table: got a capacity of {places * page_size} tokens, expected 1 to {(1 << 31) - 1}")
    checks.number("scale", scale, above=0, optional=True)
    checks.number("window", window, least=1, optional=True, integer=True)
    checks.number("softcap", softcap, above=0, optional=True)
    if checks.values_visible(lengths):
        _check_values(block_table, lengths, pages, page_size, window)
    factor = size**-0.5 if scale is None else scale
    chosen = resolve("paged_attention", backend, q)
    if chosen == "varlen" and softcap is not None:
        if backend != "auto":
            raise ValueError(f"softcap: got {softcap} with backend='varlen', which does not support it; expected None")
        chosen = "triton"
    if chosen == "reference":
        from .. import reference

        pages_of = k_pages.detach(), v_pages.detach()
        return reference.paged_attention(
            q.detach(), *pages_of, block_table, lengths, scale=factor, window=window, softcap=softcap
        )
    return _op(q, k_pages, v_pages, block_table, lengths, factor, window or 0, softcap or 0.0, chosen)


def _check_values(block_table: Tensor, lengths: Tensor, pages: int, page_size: int, window: int | None) -> None:
    """Check on CPU that lengths are within the block table, and that the pages of all tokens to read exist."""
    wrong = (lengths < 0) | (lengths > block_table.shape[1] * page_size)
    if bool(wrong.any()):
        most = block_table.shape[1] * page_size
        raise ValueError(
            f"lengths: got {lengths[wrong][0].item()} among its values, expected 0 to {most}, the capacity of block_table"
        )
    first = torch.arange(block_table.shape[1]) * page_size  # the first token of each entry
    counts = first < lengths[:, None]
    if window is not None:
        counts &= first + page_size > lengths[:, None] - window
    wrong = counts & ((block_table < 0) | (block_table >= pages))
    if bool(wrong.any()):
        raise ValueError(
            f"block_table: got page {block_table[wrong][0].item()} for tokens to read, expected 0 to {pages - 1}"
        )


def _run(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor, scale: float, window: int,
    softcap: float, backend: str,
) -> Tensor:  # fmt: skip
    q, k_pages, v_pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_pages, v_pages))
    table, lengths = block_table.contiguous(), lengths.contiguous()
    return kernels(backend).paged_attention(q, k_pages, v_pages, table, lengths, scale, window, softcap)


def _fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


_op = define(
    "paged_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor lengths, float scale,"
    " SymInt window, float softcap, str backend) -> Tensor",
    run=_run,
    fake=_fake,
)
