# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Tensor.split`.
"""The loop of the fused head over chunks of rows.

For each chunk, the vendor's matrix library computes the logits, an epilogue kernel computes everything element-wise,
and two products compute the gradients of the hidden states and of the weight while the logits are in cache.

On CPU, and on a GPU with `compact`, the loop gathers the unmasked rows and computes backward products only for rows
that have a gradient. On a GPU without `compact` all rows are in the products, and the other rows are zeros.

Legend: N tokens, M rows in the loop, V vocabulary, H hidden, R rank of the low-rank term.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast, overload

import torch
from torch import Tensor

from .. import _native  # pyright: ignore[reportPrivateUsage]  # of this package
from .._options import ACTIVE_TRIALS
from ..backend import Kernels
from ..launch_args import LogitRows, PpoRows, RowStats, Transform
from . import weights
from .weights import Head, product

MIN_CHUNK = 16
"""Minimum rows of a chunk. CPU matrix libraries sum in a different order for fewer rows, so shorter chunks are padded."""

HALF = (torch.bfloat16, torch.float16)
GPU_LOGITS_BYTES = 2**30
"""Size of a chunk of logits on a GPU, in bytes; it determines the rows of a chunk.

Each chunk reads and writes the float32 sum of the weight's gradient. For chunks of 1024 rows and a vocabulary of 128k
this takes half as long as the chunk's product."""


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
    products add to float32 sums. With the trial `half_logits` the logits have the dtype of the factors. The bits of a
    row depend on the shape of its product, so all products have the same shape for any N.
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
            logits = dtype if dtype in HALF and "half_logits" in ACTIVE_TRIALS else torch.float32
            rows = max(128, min(4096, GPU_LOGITS_BYTES // (logits.itemsize * vocab) // 128 * 128))
            chunk = max(chunk_tokens or rows, MIN_CHUNK)
            return cls(chunk, chunk, chunk, logits, torch.float32, True, bool(compact))
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
class HeadRows:
    """The rows of the head's products: the unmasked rows, gathered, or all N rows with a mask."""

    hidden: Tensor  # (M, H), contiguous
    states: Tensor | None  # (M, R), the rows of the low-rank term
    ids: Tensor  # (M,), int64
    transform: Transform
    index: Tensor | None  # (M,), index of each row among the N; None: all rows in order
    mask: Tensor | None = None  # (M,), bool; None: all True

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        states: Tensor | None,
        ids: Tensor,
        transform: Transform,
        keep: Tensor | None,
        *,
        gather: bool = True,
    ) -> "HeadRows":
        """Return the rows where `keep` (N,) is True. With `gather` on a GPU, the host waits for their number."""
        if keep is None or (gather and bool(keep.all())):
            states = None if states is None else states.contiguous()
            return cls(hidden.contiguous(), states, ids.contiguous(), transform, None)
        if not gather:
            # Masked rows may be NaN, and 0 * NaN in a product would be NaN.
            hidden = torch.where(keep[:, None], hidden, 0)
            states = None if states is None else torch.where(keep[:, None], states, 0)
            return cls(hidden, states, ids.contiguous(), transform, None, keep.contiguous())
        index = keep.nonzero().squeeze(1)
        states = None if states is None else states[index]
        return cls(hidden[index], states, ids[index], transform.rows(index), index)

    def chunks(self, size: int) -> Iterator[slice]:
        """Yield slices of at most `size` rows that cover all rows."""
        for start in range(0, len(self.ids), size):
            yield slice(start, min(start + size, len(self.ids)))

    def logits(self, head: Head, rows: slice, out: Tensor, pad_to: int) -> Tensor:
        """Return the logits of `rows`, see `Head.logits`."""
        return head.logits(self.hidden[rows], None if self.states is None else self.states[rows], out, pad_to)

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
        """Return the entries of `x` (..., N) for these rows, (..., M)."""
        return x if x is None or self.index is None else x[..., self.index]

    def spread(self, x: Tensor, n: int) -> Tensor:
        """Return `x` (..., M) as (..., N) with zeros for the other rows, the inverse of `take`."""
        return x if self.index is None else x.new_zeros(*x.shape[:-1], n).index_copy_(-1, self.index, x)


class Needs(NamedTuple):
    """Whether each input of the head needs a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    states: bool
    low_weight: bool


class Results(NamedTuple):
    """Gradients of the head's inputs, in float32 except that of the weight; None if not needed."""

    hidden: Tensor | None  # (N, H)
    weight: Tensor | None  # (V, H)
    bias: Tensor | None  # (V,)
    states: Tensor | None  # (N, R)
    low_weight: Tensor | None  # (V, R)


class HeadGradients:
    """Gradients of the head's inputs, summed over chunks and not divided by the loss's denominator."""

    def __init__(self, kernels: Kernels, head: Head, n: int, plan: Plan, needs: Needs):
        self.kernels: Kernels = kernels
        self.head: Head = head
        self.plan: Plan = plan
        self.needs: Needs = needs
        device, low = head.weight.device, head.low_weight
        # Rows without a gradient are never written, so they must be zero at the start.
        self.hidden: Tensor | None = torch.zeros(n, head.width, device=device) if needs.hidden else None
        self.weight: Tensor | None = None
        if needs.weight:
            self.weight = _native.empty((head.vocabulary, head.width), plan.sum_dtype, device)
        self.bias: Tensor | None = torch.zeros(head.vocabulary, device=device) if needs.bias else None
        self.states: Tensor | None = None
        self.low_weight: Tensor | None = None
        if low is not None:
            self.states = torch.zeros(n, low.shape[1], device=device) if needs.states else None
            self.low_weight = torch.zeros(low.shape, device=device) if needs.low_weight else None
        self.first: bool = True

    def add_rows(self, dlogits: Tensor, of: HeadRows, rows: Tensor | slice) -> None:
        """Add the part of `rows`, m of the M rows `of`, to all gradients except the weight's, from `dlogits` (m, V)."""
        weight, in_place = self.head.weight, isinstance(rows, slice) and of.index is None and self.plan.wide
        target = rows if of.index is None else of.index[rows]  # the indices among the N rows
        if self.hidden is not None and in_place and isinstance(weight, Tensor):
            product(dlogits, weight, self.hidden[rows])
        elif self.hidden is not None:
            self.hidden[target] = self.head.hidden_gradient(dlogits, self._dtype(dlogits)).float()
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=torch.float32)
        low = self.head.low_weight
        if self.states is not None:
            assert low is not None
            part = torch.empty(len(dlogits), low.shape[1], dtype=self._dtype(dlogits), device=dlogits.device)
            product(dlogits, low, part)
            self.states[target] = part.float()
        if self.low_weight is not None:
            assert of.states is not None
            self._add_outer(self.low_weight, dlogits, of.states[rows], first=False)

    def add_weight(self, dlogits: Tensor, of: HeadRows, rows: Tensor | slice) -> None:
        """Add the part of `rows`, m of the M rows `of`, to the gradient of the weight, from `dlogits` (m, V)."""
        assert self.weight is not None
        self._add_outer(self.weight, dlogits, of.hidden[rows], first=self.first)
        self.first = False

    def results(self) -> Results:
        """Return the gradients. The weight's gradient is zero if no rows were added."""
        if self.first and self.weight is not None:
            self.weight.zero_()
        return Results(self.hidden, self.weight, self.bias, self.states, self.low_weight)

    def _dtype(self, dlogits: Tensor) -> torch.dtype:
        """Return the dtype of the products with `dlogits`, which the CPU's library rounds to its factors' dtype."""
        return torch.float32 if self.plan.wide else dlogits.dtype

    def _add_outer(self, total: Tensor, dlogits: Tensor, factor: Tensor, *, first: bool) -> None:
        """Compute `total += dlogits.T @ factor`, or set `total` to it if `first`."""
        transposed = dlogits.t()
        apart = not weights.has_products(dlogits.dtype, dlogits.device.type)
        if self.plan.wide or total.dtype == dlogits.dtype or apart:
            product(transposed, factor, total, add=not first)
            return
        if dlogits.dtype == torch.float16:
            factor = factor.float()
        for block in _blocks(len(total), 8192):
            part = torch.mm(transposed[block].to(factor.dtype), factor)
            self.kernels.accumulate(total[block], part, first=first)


def _blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _buffer(head: Head, rows: HeadRows, plan: Plan, *, keep: bool) -> Tensor:
    """Return memory for the logits of a chunk if `keep`, else of a step."""
    shape = (plan.rows(len(rows.ids), keep=keep), head.vocabulary)
    return _native.WORKSPACE.take(shape, plan.logits_dtype, rows.hidden.device)


def head_stats(kernels: Kernels, head: Head, rows: HeadRows, plan: Plan) -> RowStats:
    """Return log-prob and entropy of each row, with one product and no gradient."""
    stats = RowStats.empty(len(rows.ids), rows.hidden.device)
    buffer = _buffer(head, rows, plan, keep=False)
    for chunk in rows.chunks(plan.step):
        part = RowStats.empty(chunk.stop - chunk.start, rows.hidden.device)
        logits = rows.logits(head, chunk, buffer, plan.pad_to)
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
    needs: Needs,
    epilogue: Epilogue,
) -> Results:
    """Return the gradients of one pass over the rows, which computes logits, `epilogue` and backward products."""
    gradients = HeadGradients(kernels, head, n, plan, needs)
    add_gradients(gradients, rows, rows.chunks(plan.step), epilogue)
    return gradients.results()


def add_gradients(gradients: HeadGradients, rows: HeadRows, blocks: Iterable[slice], epilogue: Epilogue) -> None:
    """Add the gradients of one pass over consecutive `blocks` of rows, each at most as long as the buffer of logits."""
    head, plan, needs = gradients.head, gradients.plan, gradients.needs
    buffer = _buffer(head, rows, plan, keep=needs.weight)
    dlogits = front_of(buffer, rows.hidden.dtype)
    held: list[Tensor | slice] = []  # the rows whose gradients are stored at the front of the buffer
    filled = 0
    for block in blocks:
        size = block.stop - block.start
        if held and filled + max(size, plan.pad_to) > len(buffer):
            gradients.add_weight(dlogits[:filled], rows, _joined(held))
            held, filled = [], 0
        logits = rows.logits(head, block, buffer[filled:], plan.pad_to)
        gradient = dlogits[filled : filled + size]
        active = epilogue(rows.logit_rows(logits, block), block, gradient)
        front, kept = block, size
        if plan.compact:
            front = gradients.kernels.compact_rows(gradient, active) + block.start
            kept = len(front)
        if kept:
            gradients.add_rows(gradient[:kept], rows, front)
            if needs.weight:
                held.append(front)
                filled += kept
    if held:
        gradients.add_weight(dlogits[:filled], rows, _joined(held))


def front_of(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a view (N, V) of the logits' memory as `dtype`: the front of each row if `dtype` is narrower."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]


def _joined(held: list[Tensor | slice]) -> Tensor | slice:
    """Return the rows of several steps as one index; slices must be consecutive."""
    if isinstance(held[0], slice):
        return slice(held[0].start, cast(slice, held[-1]).stop)
    return torch.cat(cast(list[Tensor], held))  # all are tensors, or all slices


def row_pass(gradients: HeadGradients, rows: HeadRows, ppo: PpoRows) -> RowStats:
    """Add the gradients for an objective whose gradient in a row depends on that row only; return the rows' statistics."""
    plan, stats = gradients.plan, RowStats.empty(len(rows.ids), rows.hidden.device)
    if rows.index is not None:
        ppo = ppo.rows(rows.index)

    def epilogue(x: LogitRows, chunk: slice, out: Tensor) -> Tensor:
        part = RowStats.empty(chunk.stop - chunk.start, rows.hidden.device)
        active = gradients.kernels.ppo_epilogue(x, part, ppo.rows(chunk), out)
        stats.buffer[:, chunk] = part.buffer
        return active

    add_gradients(gradients, rows, rows.chunks(plan.step), epilogue)
    return stats


def given_epilogue(
    kernels: Kernels,
    stats: RowStats,
    grad_logprobs: Tensor | None,  # (M,)
    grad_entropy: Tensor | None,  # (M,)
) -> Epilogue:
    """Return the epilogue for known statistics and upstream gradients of log-probs and entropies."""

    def epilogue(x: LogitRows, chunk: slice, out: Tensor) -> Tensor:
        g, h = (None if y is None else y[chunk].contiguous() for y in (grad_logprobs, grad_entropy))
        return write_gradient(kernels, x, RowStats(stats.buffer[:, chunk].contiguous()), g, h, out)

    return epilogue


def write_gradient(
    kernels: Kernels, x: LogitRows, stats: RowStats, g: Tensor | None, h: Tensor | None, out: Tensor
) -> Tensor:
    """Write the gradient of the logits to `out` and return which rows have one, (m,) bool."""
    kernels.token_logprobs_backward(x, stats, out, g, h)
    zero = torch.zeros(len(x.ids), dtype=torch.bool, device=x.ids.device)
    return (zero if g is None else g != 0) | (zero if h is None else h != 0)
