# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Tensor.split`.
"""The loop of the fused head over chunks of rows.

For each chunk, the vendor's matrix library computes the logits, an epilogue kernel computes everything element-wise,
and two products compute the gradients of the hidden states and of the weight while the logits are in cache.

On CPU, and on a GPU with `compact`, the loop gathers the unmasked rows and computes backward products only for rows
that have a gradient. On a GPU without `compact` all rows are in the products, and the other rows are zeros.

Legend: N tokens, M rows in the loop, V vocabulary, H hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import cast, overload

import torch
from torch import Tensor

from .. import _native  # pyright: ignore[reportPrivateUsage]  # of this package
from ..backend import Kernels
from ..launch_args import LogitRows, PpoRows, RowStats, Transform

MIN_CHUNK = 16
"""Minimum rows of a chunk. CPU matrix libraries sum in a different order for fewer rows, so shorter chunks are padded."""

GPU_LOGITS_BYTES = 2**30
"""Size of a chunk of float32 logits on a GPU, in bytes; it determines the rows of a chunk.

Each chunk reads and writes the float32 sum of the weight's gradient. For chunks of 1024 rows and a vocabulary of 128k
this takes half as long as the chunk's product."""

_PART = 1024
"""Rows, columns or terms of a product that are converted to float32 at a time."""


_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@cache
def has_products(dtype: torch.dtype, device: str) -> bool:
    """Return whether torch multiplies `dtype` matrices on a device of type `device` at least as fast as float32 matrices.

    False for half precision on a processor without instructions for it, or with a torch that was built without oneDNN:
    products in half precision then take several times as long as in float32.
    """
    if device != "cpu" or dtype not in _ASKED:
        return True
    asked = getattr(torch.ops.mkldnn, _ASKED[dtype], None) if torch.backends.mkldnn.is_available() else None
    return asked is not None and bool(asked())


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Compute `out = a @ b`, or `out += a @ b`, without rounding to half precision if `out` is float32."""
    if a.dtype in (torch.bfloat16, torch.float16) and not has_products(a.dtype, a.device.type):
        _product_in_float32(a, b, out, add=add)
    elif out.dtype == a.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the Triton interpreter runs on CPU, where torch has no product of half-precision factors with a float32 result
        product(a.float(), b.float(), out, add=add)


def _product_in_float32(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """Compute `product` with float32 sums, rounded once. The longest dimension is converted to float32 in parts."""
    (rows, terms), columns = a.shape, b.shape[1]
    if terms >= max(rows, columns):
        total = out.float() if add else a.new_zeros(rows, columns, dtype=torch.float32)
        for part_a, part_b in zip(a.split(_PART, 1), b.split(_PART), strict=True):
            total.addmm_(part_a.float(), part_b.float())
        out.copy_(total)
        return
    if rows > max(columns, _PART):  # out.T = b.T @ a.T
        a, b, out = b.t(), a.t(), out.t()
    a = a.float()
    for part_b, part_out in zip(b.split(_PART, 1), out.split(_PART, 1), strict=True):
        # In place, because autocast would cast the factors of an out-of-place product.
        total = part_out.float() if add else a.new_zeros(part_out.shape)
        part_out.copy_(total.addmm_(a, part_b.float()))


@dataclass(frozen=True)
class Plan:
    """The number of rows per chunk and per step, and the dtypes of the logits and of the gradient sums.

    A step computes the logits of its rows, the epilogue and the gradient of the hidden states while the logits are in
    cache. The gradients of the logits are collected until there are `chunk` rows for one product into the weight's
    gradient. The plan is computed from shapes only, so that a compiled graph knows the dtypes.

    On CPU the library rounds half-precision products, so the weight's gradient needs a float32 sum over [V, H] per
    chunk. Chunks are therefore large, and a batch of one chunk needs no sum. float32 products are added in place.
    float16 sums are always float32, because the sums can exceed 65504 before they are divided by the denominator.

    On a GPU (`wide`) half-precision factors give float32 logits, so that log-probs are not rounded to bf16, and the
    products add to float32 sums. The bits of a row depend on the shape of its product, so all products have the same
    shape for any N.
    """

    chunk: int
    step: int
    pad_to: int  # minimum rows of a product that computes logits
    logits_dtype: torch.dtype
    sum_dtype: torch.dtype
    wide: bool
    compact: bool  # leave rows without a gradient out of the backward products, and masked rows out of all products

    @classmethod
    def of(
        cls, n: int, vocab: int, dtype: torch.dtype, backend: str, chunk_tokens: int | None, compact: bool | None
    ) -> "Plan":
        """Return the plan for `n` rows of hidden states of `dtype`; `chunk_tokens` overrides the default chunk."""
        if backend != "cpu":
            rows = max(128, min(4096, GPU_LOGITS_BYTES // (4 * vocab) // 128 * 128))
            chunk = max(chunk_tokens or rows, MIN_CHUNK)
            return cls(chunk, chunk, chunk, torch.float32, torch.float32, True, bool(compact))
        default, step = (512, 512) if dtype == torch.float32 else (2048, 256)
        chunk = max(chunk_tokens or default, MIN_CHUNK)
        one_product = n <= chunk and dtype == torch.bfloat16
        return cls(chunk, min(step, chunk), MIN_CHUNK, dtype, dtype if one_product else torch.float32, False, True)

    def rows(self, n: int | None, *, keep: bool) -> int:
        """Return the rows of logits in memory at a time for `n` rows (None: any number): a chunk if `keep`, else a step."""
        most = self.chunk if keep else self.step
        return max(most if n is None else min(most, n), self.pad_to)


def head_workspace_bytes(
    vocab: int,
    dtype: torch.dtype,
    *,
    tokens: int | None = None,
    gradient: bool = True,
    backend: str = "cpu",
    chunk_tokens: int | None = None,
) -> int:
    """Return the bytes of logits that the fused head stores at a time, for `lend_workspace` and for memory plans.

    `dtype` is the dtype of the hidden states, `tokens` the number of unmasked tokens (None: any number), `gradient`
    whether the weight needs a gradient, and `backend` "cpu", "triton" or "cuda". The reference backend computes all
    logits at once and uses no workspace.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in ("cpu", "triton", "cuda"):
        raise ValueError(f"backend: got {backend!r}, expected 'cpu', 'triton' or 'cuda'")
    plan = Plan.of(tokens or 0, vocab, dtype, backend, chunk_tokens, None)
    return plan.rows(tokens, keep=gradient) * vocab * plan.logits_dtype.itemsize


@dataclass(frozen=True)
class Head:
    """The weights of the output layer `hidden @ weight.T + bias`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)

    def logits(self, hidden: Tensor, out: Tensor, pad_to: int) -> Tensor:
        """Return the logits of `hidden` (m, H) in the first m rows of `out`, padding the product to `pad_to` rows."""
        rows = len(hidden)
        if rows < pad_to:
            hidden = torch.cat([hidden, hidden.new_zeros(pad_to - rows, hidden.shape[1])])
        z = out[: len(hidden)]
        if self.bias is not None and not has_products(hidden.dtype, hidden.device.type):
            z.copy_(self.bias)
            product(hidden, self.weight.t(), z, add=True)
        elif self.bias is not None and z.dtype == hidden.dtype:
            torch.addmm(self.bias, hidden, self.weight.t(), out=z)
        else:
            product(hidden, self.weight.t(), z)
            if self.bias is not None:
                z += self.bias
        return z[:rows]


@dataclass(frozen=True)
class HeadRows:
    """The rows of the head's products: the unmasked rows, gathered, or all N rows with a mask."""

    hidden: Tensor  # (M, H), contiguous
    ids: Tensor  # (M,), int64
    transform: Transform
    index: Tensor | None  # (M,), index of each row among the N; None: all rows in order
    mask: Tensor | None = None  # (M,), bool; None: all True

    @classmethod
    def of(
        cls, hidden: Tensor, ids: Tensor, transform: Transform, keep: Tensor | None, *, gather: bool = True
    ) -> "HeadRows":
        """Return the rows where `keep` (N,) is True. With `gather` on a GPU, the host waits for their number."""
        if keep is None or (gather and bool(keep.all())):
            return cls(hidden.contiguous(), ids.contiguous(), transform, None)
        if not gather:
            # Masked rows may be NaN, and 0 * NaN in a product would be NaN.
            hidden = torch.where(keep[:, None], hidden, 0)
            return cls(hidden, ids.contiguous(), transform, None, keep.contiguous())
        index = keep.nonzero().squeeze(1)
        return cls(hidden[index], ids[index], transform.rows(index), index)

    def chunks(self, size: int) -> Iterator[slice]:
        """Yield slices of at most `size` rows that cover all rows."""
        for start in range(0, len(self.ids), size):
            yield slice(start, min(start + size, len(self.ids)))

    def logit_rows(self, logits: Tensor, rows: slice) -> LogitRows:
        """Return the logits of `rows` with their ids, transform and mask, as the kernels expect them."""
        return LogitRows(
            logits, self.ids[rows], self.transform.rows(rows), None if self.mask is None else self.mask[rows]
        )

    @overload
    def take(self, x: Tensor) -> Tensor: ...

    @overload
    def take(self, x: Tensor | None) -> Tensor | None: ...

    def take(self, x: Tensor | None) -> Tensor | None:
        """Return the entries of `x` (N,) for these rows, (M,)."""
        return x if x is None or self.index is None else x[self.index]

    def spread(self, x: Tensor, n: int) -> Tensor:
        """Return `x` (..., M) as (..., N) with zeros for the other rows, the inverse of `take`."""
        return x if self.index is None else x.new_zeros(*x.shape[:-1], n).index_copy_(-1, self.index, x)


Results = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of hidden states (N, H), weight (V, H) and bias (V,); None if not needed."""


class HeadGradients:
    """Gradients of the head's inputs, summed over chunks and not divided by the loss's denominator."""

    def __init__(
        self, kernels: Kernels, head: Head, n: int, rows: HeadRows, plan: Plan, needs: tuple[bool, bool, bool]
    ):
        self.kernels: Kernels = kernels
        self.head: Head = head
        self.rows: HeadRows = rows
        self.wide: bool = plan.wide
        weight = head.weight
        # Rows without a gradient are never written, so they must be zero at the start.
        self.hidden: Tensor | None = torch.zeros(n, weight.shape[1], device=weight.device) if needs[0] else None
        self.weight: Tensor | None = _native.empty(weight.shape, plan.sum_dtype, weight.device) if needs[1] else None
        self.bias: Tensor | None = torch.zeros(len(weight), device=weight.device) if needs[2] else None
        self.first: bool = True

    def add_rows(self, dlogits: Tensor, rows: Tensor | slice) -> None:
        """Add the part of `rows`, m of the M rows, to the gradients of hidden states and bias, from `dlogits` (m, V)."""
        if self.hidden is not None and isinstance(rows, slice) and self.rows.index is None and self.wide:
            product(dlogits, self.head.weight, self.hidden[rows])
        elif self.hidden is not None:
            target = rows if self.rows.index is None else self.rows.index[rows]
            dtype = torch.float32 if self.wide else dlogits.dtype
            part = torch.empty(len(dlogits), self.hidden.shape[1], dtype=dtype, device=dlogits.device)
            product(dlogits, self.head.weight, part)
            self.hidden[target] = part.float()
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=torch.float32)

    def add_weight(self, dlogits: Tensor, rows: Tensor | slice) -> None:
        """Add the part of `rows`, m of the M rows, to the gradient of the weight, from `dlogits` (m, V)."""
        assert self.weight is not None
        transposed, hidden = dlogits.t(), self.rows.hidden[rows]
        apart = not has_products(dlogits.dtype, dlogits.device.type)
        if self.wide or self.weight.dtype == dlogits.dtype or apart:
            product(transposed, hidden, self.weight, add=not self.first)
        else:
            if dlogits.dtype == torch.float16:
                hidden = hidden.float()
            for block in _blocks(len(self.weight), 8192):
                part = torch.mm(transposed[block].to(hidden.dtype), hidden)
                self.kernels.accumulate(self.weight[block], part, first=self.first)
        self.first = False

    def results(self) -> Results:
        """Return the gradients. The weight's gradient is zero if no rows were added."""
        if self.first and self.weight is not None:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


def _blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _buffer(head: Head, rows: HeadRows, plan: Plan, *, keep: bool) -> Tensor:
    """Return memory for the logits of a chunk if `keep`, else of a step."""
    shape = (plan.rows(len(rows.ids), keep=keep), len(head.weight))
    return _native.WORKSPACE.take(shape, plan.logits_dtype, rows.hidden.device)


def head_stats(kernels: Kernels, head: Head, rows: HeadRows, plan: Plan) -> RowStats:
    """Return log-prob and entropy of each row, with one product and no gradient."""
    stats = RowStats.empty(len(rows.ids), rows.hidden.device)
    buffer = _buffer(head, rows, plan, keep=False)
    for chunk in rows.chunks(plan.step):
        part = RowStats.empty(chunk.stop - chunk.start, rows.hidden.device)
        logits = head.logits(rows.hidden[chunk], buffer, plan.pad_to)
        kernels.token_logprobs_forward(rows.logit_rows(logits, chunk), part)
        stats.buffer[:, chunk] = part.buffer
    return stats


Epilogue = Callable[[LogitRows, slice, Tensor], Tensor]
"""Writes the gradient of a chunk's logits to the last argument and returns which rows have a gradient, (m,) bool."""


def head_gradients(
    kernels: Kernels,
    head: Head,
    rows: HeadRows,
    n: int,
    plan: Plan,
    needs: tuple[bool, bool, bool],
    epilogue: Epilogue,
) -> Results:
    """Return the gradients of one pass over the rows, which computes logits, `epilogue` and backward products."""
    gradients = HeadGradients(kernels, head, n, rows, plan, needs)
    buffer = _buffer(head, rows, plan, keep=needs[1])
    dlogits = front_of(buffer, rows.hidden.dtype)
    held: list[Tensor | slice] = []  # the rows whose gradients are stored at the front of the buffer
    filled = 0
    for chunk in rows.chunks(plan.step):
        size = chunk.stop - chunk.start
        if held and filled + max(size, plan.pad_to) > len(buffer):
            gradients.add_weight(dlogits[:filled], _joined(held))
            held, filled = [], 0
        logits = head.logits(rows.hidden[chunk], buffer[filled:], plan.pad_to)
        gradient = dlogits[filled : filled + size]
        active = epilogue(rows.logit_rows(logits, chunk), chunk, gradient)
        front, kept = chunk, size
        if plan.compact:
            front = kernels.compact_rows(gradient, active) + chunk.start
            kept = len(front)
        if kept:
            gradients.add_rows(gradient[:kept], front)
            if needs[1]:
                held.append(front)
                filled += kept
    if held:
        gradients.add_weight(dlogits[:filled], _joined(held))
    return gradients.results()


def front_of(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a view (N, V) of the logits' memory as `dtype`: the front of each row if `dtype` is narrower."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]


def _joined(held: list[Tensor | slice]) -> Tensor | slice:
    """Return the rows of several steps as one index; slices must be consecutive."""
    if isinstance(held[0], slice):
        return slice(held[0].start, cast(slice, held[-1]).stop)
    return torch.cat(cast(list[Tensor], held))  # all are tensors, or all slices


def ppo_pass(
    kernels: Kernels, head: Head, rows: HeadRows, ppo: PpoRows, n: int, plan: Plan, needs: tuple[bool, bool, bool]
) -> tuple[RowStats, Results]:
    """Return statistics and gradients of one pass, for an objective whose gradient in a row depends on that row only."""
    stats = RowStats.empty(len(rows.ids), rows.hidden.device)
    if rows.index is not None:
        ppo = ppo.rows(rows.index)

    def epilogue(x: LogitRows, chunk: slice, out: Tensor) -> Tensor:
        part = RowStats.empty(chunk.stop - chunk.start, rows.hidden.device)
        active = kernels.ppo_epilogue(x, part, ppo.rows(chunk), out)
        stats.buffer[:, chunk] = part.buffer
        return active

    return stats, head_gradients(kernels, head, rows, n, plan, needs, epilogue)


def given_pass(
    kernels: Kernels,
    head: Head,
    rows: HeadRows,
    stats: RowStats,
    grad_logprobs: Tensor | None,  # (M,)
    grad_entropy: Tensor | None,  # (M,)
    n: int,
    plan: Plan,
    needs: tuple[bool, bool, bool],
) -> Results:
    """Return the gradients for given upstream gradients of log-probs and entropies; the logits are computed again."""

    def epilogue(x: LogitRows, chunk: slice, out: Tensor) -> Tensor:
        g, h = (None if y is None else y[chunk].contiguous() for y in (grad_logprobs, grad_entropy))
        kernels.token_logprobs_backward(x, RowStats(stats.buffer[:, chunk].contiguous()), out, g, h)
        zero = torch.zeros(len(x.ids), dtype=torch.bool, device=x.ids.device)
        return (zero if g is None else g != 0) | (zero if h is None else h != 0)

    return head_gradients(kernels, head, rows, n, plan, needs, epilogue)
