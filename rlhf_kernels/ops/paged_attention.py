"""Attention of one new token a sequence over keys and values that lie in pages: the decode step of a rollout.

Not a formula of PPO, and the ops of design.md did without it: a rollout whose KV pages share bytes with the gradients needs
attention that reads pages where they lie, with bits that do not depend on the batch, or a sampled log-prob would depend on
its neighbours. Torch has that only where FlashAttention-3 or -4 is installed and activated (see `backend.why_no_varlen`).
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
    """`softmax(scale * q k^T) v` for one query a sequence, over its last `window` tokens or all of them.

    Token t of sequence b lies at `k_pages[block_table[b, t // page size], t % page size]`, and `lengths[b]` tokens count, the
    query's own among them. `heads / groups` query heads share the keys of one group. `scale` is `D ** -0.5` by default; with a
    `softcap` a logit s becomes `softcap * tanh(s / softcap)`. A sequence of length 0 gets zeros. Pages, places of the table
    and tokens beyond a length or before a window are not read and may hold anything. Sums are float32 or wider, the result has
    q's dtype, and its bits depend on nothing but the row's own. No gradient.

    In a page a token's keys of all groups are neighbours: a token is written in one piece, a head's key is read in one
    piece of D, and it is the layout that `torch.nn.attention.varlen` takes.

    Source: Kwon et al. 2023 (paged attention); Dao et al. 2023 (flash-decoding).

    Raises:
        ValueError: a shape, dtype, device or range that does not fit, with the argument's name. On CPU that includes a page
            that does not exist and a length beyond the table; elsewhere their rows are NaN.
    """
    checks.floating("q", q, dims=(3,), what="[B, heads, D]")
    b, heads, size = q.shape
    checks.floating("k_pages", k_pages, dims=(4,), what="[P, page size, groups, D]")
    pages, page_size, groups, _ = k_pages.shape
    if groups == 0 or heads % groups or pages == 0 or page_size == 0:
        what = f"some pages of some tokens, and groups that share q's {heads} heads evenly"
        raise ValueError(f"k_pages: got shape {checks.shape(k_pages)}, expected {what}")
    for name, x in (("k_pages", k_pages), ("v_pages", v_pages)):
        expected = (pages, page_size, groups, size)
        checks.tensor(name, x, like=q, expected=expected, what="[P, page size, groups, D]", dtypes=(q.dtype,))
    int32 = (torch.int32,)
    checks.tensor("lengths", lengths, like=q, expected=(b,), what="one length a sequence", dtypes=int32)
    # A caller may pass what is no tensor.
    given = isinstance(block_table, Tensor)  # pyright: ignore[reportUnnecessaryIsInstance]
    places = block_table.shape[-1] if given and block_table.dim() else 0
    checks.tensor("block_table", block_table, like=q, expected=(b, places), what="[B, M]", dtypes=int32)
    if not 0 < places * page_size < 1 << 31:
        raise ValueError(f"block_table: got room for {places * page_size} tokens, expected 1 to {(1 << 31) - 1}")
    checks.number("scale", scale, above=0, optional=True)
    checks.number("window", window, least=1, optional=True, integer=True)
    checks.number("softcap", softcap, above=0, optional=True)
    if checks.values_visible(lengths):
        _check_values(block_table, lengths, pages, page_size, window)
    factor = size**-0.5 if scale is None else scale
    chosen = resolve("paged_attention", backend, q)
    if chosen == "varlen" and softcap is not None:
        if backend != "auto":
            raise ValueError(f"softcap: got {softcap} with backend='varlen', which has none; expected None")
        chosen = "triton"
    if chosen == "reference":
        from .. import reference

        pages_of = k_pages.detach(), v_pages.detach()
        return reference.paged_attention(
            q.detach(), *pages_of, block_table, lengths, scale=factor, window=window, softcap=softcap
        )
    return _op(q, k_pages, v_pages, block_table, lengths, factor, window or 0, softcap or 0.0, chosen)


def _check_values(block_table: Tensor, lengths: Tensor, pages: int, page_size: int, window: int | None) -> None:
    """On CPU: lengths that the table has room for, and pages that exist wherever a token counts."""
    wrong = (lengths < 0) | (lengths > block_table.shape[1] * page_size)
    if bool(wrong.any()):
        most = block_table.shape[1] * page_size
        raise ValueError(
            f"lengths: got {lengths[wrong][0].item()} among its values, expected 0 to {most}, the table's room"
        )
    first = torch.arange(block_table.shape[1]) * page_size  # the first token of each place
    counts = first < lengths[:, None]
    if window is not None:
        counts &= first + page_size > lengths[:, None] - window
    wrong = counts & ((block_table < 0) | (block_table >= pages))
    if bool(wrong.any()):
        raise ValueError(
            f"block_table: got page {block_table[wrong][0].item()} where tokens count, expected 0 to {pages - 1}"
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
