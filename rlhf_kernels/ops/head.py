"""The fused head's one loop: logits of some rows by the vendor's matrix library, an epilogue kernel that owns
everything element-wise, then the two backward products while they are still there.

On CPU, and on a GPU where `compact` asks for it, only rows that count come in and only rows with a gradient enter the
backward products; otherwise they are zeros there. Legend: M rows, V vocabulary, H hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _native
from .._cpu import accumulate
from ..backend import Kernels
from ..launch_args import LogitRows, PpoRows, RowStats, Transform
from ..workspace import WORKSPACE
from .products import Plan, has_products, product


@dataclass(frozen=True)
class Head:
    """The output layer: `hidden @ weight.T + bias`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)

    def logits(self, hidden: Tensor, out: Tensor, pad_to: int) -> Tensor:
        """Logits of `hidden` (m, H), in the front rows of `out`; the product has at least `pad_to` rows."""
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
    """The rows that enter the head: gathered from all N, or all of them with a mask."""

    hidden: Tensor  # (M, H), contiguous
    ids: Tensor  # (M,), int64
    transform: Transform
    index: Tensor | None  # (M,), where each came from; None: all of them, in order
    mask: Tensor | None = None  # (M,), bool; None: all count

    @classmethod
    def of(
        cls, hidden: Tensor, ids: Tensor, transform: Transform, keep: Tensor | None, *, gather: bool = True
    ) -> "HeadRows":
        """The rows that `keep` (N,) marks. Gathering them needs their number, which makes a GPU wait."""
        if keep is None or (gather and bool(keep.all())):
            return cls(hidden.contiguous(), ids.contiguous(), transform, None)
        if not gather:
            # What lies in the rows that do not count must not reach a product: 0 * NaN is NaN.
            hidden = torch.where(keep[:, None], hidden, 0)
            return cls(hidden, ids.contiguous(), transform, None, keep.contiguous())
        index = keep.nonzero().squeeze(1)
        return cls(hidden[index], ids[index], transform.rows(index), index)

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, len(self.ids), size):
            yield slice(start, min(start + size, len(self.ids)))

    def logit_rows(self, logits: Tensor, rows: slice) -> LogitRows:
        return LogitRows(
            logits, self.ids[rows], self.transform.rows(rows), None if self.mask is None else self.mask[rows]
        )

    def take(self, x: Tensor | None) -> Tensor | None:
        """(N,) to (M,)."""
        return x if x is None or self.index is None else x[self.index]

    def spread(self, x: Tensor, n: int) -> Tensor:
        """(..., M) to (..., N), zeros elsewhere."""
        return x if self.index is None else x.new_zeros(*x.shape[:-1], n).index_copy_(-1, self.index, x)


class HeadGradients:
    """Gradients of the head's inputs, summed over chunks in float32 and not yet scaled."""

    def __init__(self, head: Head, n: int, rows: HeadRows, plan: Plan, needs: tuple[bool, bool, bool]):
        self.head, self.rows, self.wide = head, rows, plan.wide
        weight = head.weight
        # Rows that have no gradient are never written, so they must be zero beforehand.
        self.hidden = torch.zeros(n, weight.shape[1], device=weight.device) if needs[0] else None
        self.weight = _native.empty(weight.shape, plan.sum_dtype, weight.device) if needs[1] else None
        self.bias = torch.zeros(len(weight), device=weight.device) if needs[2] else None
        self.first = True

    def add_rows(self, dlogits: Tensor, rows: Tensor | slice) -> None:
        """Takes in the gradient of the logits (m, V) of the rows (m,), numbers among the M: all but the weight's."""
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
        """Takes in the weight's part of the gradient of the logits (m, V) of the rows (m,)."""
        transposed, hidden = dlogits.t(), self.rows.hidden[rows]
        apart = not has_products(dlogits.dtype, dlogits.device.type)
        if self.wide or self.weight.dtype == dlogits.dtype or apart:
            product(transposed, hidden, self.weight, add=not self.first)
        else:
            if dlogits.dtype == torch.float16:
                hidden = hidden.float()
            for block in _blocks(len(self.weight), 8192):
                part = torch.mm(transposed[block].to(hidden.dtype), hidden)
                accumulate(self.weight[block], part, first=self.first)
        self.first = False

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """d hidden (N, H), d weight (V, H), d bias (V,); None where not asked for."""
        if self.first and self.weight is not None:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


def _blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _buffer(head: Head, rows: HeadRows, plan: Plan, *, keep: bool) -> Tensor:
    """Room for a chunk of logits, or for one step where nothing needs to stay."""
    shape = (plan.rows(len(rows.ids), keep=keep), len(head.weight))
    return WORKSPACE.take(shape, plan.logits_dtype, rows.hidden.device)


def head_stats(kernels: Kernels, head: Head, rows: HeadRows, plan: Plan) -> RowStats:
    """Log-probs and entropy of every row: one product, no gradient."""
    stats = RowStats.empty(len(rows.ids), rows.hidden.device)
    buffer = _buffer(head, rows, plan, keep=False)
    for chunk in rows.chunks(plan.step):
        part = RowStats.empty(chunk.stop - chunk.start, rows.hidden.device)
        logits = head.logits(rows.hidden[chunk], buffer, plan.pad_to)
        kernels.token_logprobs_forward(rows.logit_rows(logits, chunk), part)
        stats.buffer[:, chunk] = part.buffer
    return stats


Epilogue = Callable[[LogitRows, slice, Tensor], Tensor]
"""Writes the gradient of a chunk's logits to the last argument; returns which of its rows have one, bool (m,)."""


def head_gradients(
    kernels: Kernels,
    head: Head,
    rows: HeadRows,
    n: int,
    plan: Plan,
    needs: tuple[bool, bool, bool],
    epilogue: Epilogue,
):
    """One pass over the rows: logits, `epilogue`, backward products."""
    gradients = HeadGradients(head, n, rows, plan, needs)
    buffer = _buffer(head, rows, plan, keep=needs[1])
    dlogits = front_of(buffer, rows.hidden.dtype)
    held: list[Tensor | slice] = []  # which rows' gradients lie at the front of the buffer
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
    """Room for a gradient (N, V) of `dtype` in the bytes of the logits: in the front of each row where it is narrower."""
    return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]


def _joined(held: list[Tensor | slice]) -> Tensor | slice:
    """The rows of one product; slices follow each other."""
    if isinstance(held[0], slice):
        return slice(held[0].start, held[-1].stop)
    return torch.cat(held)


def ppo_pass(
    kernels: Kernels, head: Head, rows: HeadRows, ppo: PpoRows, n: int, plan: Plan, needs: tuple[bool, bool, bool]
):
    """Statistics and gradients in one pass: the row's own log-prob decides its coefficient."""
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
):
    """Gradients from coefficients that are known beforehand; the logits are made again."""

    def epilogue(x: LogitRows, chunk: slice, out: Tensor) -> Tensor:
        g, h = (None if y is None else y[chunk].contiguous() for y in (grad_logprobs, grad_entropy))
        kernels.token_logprobs_backward(x, RowStats(stats.buffer[:, chunk].contiguous()), out, g, h)
        zero = torch.zeros(len(x.ids), dtype=torch.bool, device=x.ids.device)
        return (zero if g is None else g != 0) | (zero if h is None else h != 0)

    return head_gradients(kernels, head, rows, n, plan, needs, epilogue)
