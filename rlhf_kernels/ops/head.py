"""The fused head's one loop: logits of some rows by the vendor's matrix library, an epilogue kernel that owns
everything element-wise, then the two backward products while they are still there.

Only rows that count come in; only rows with a gradient enter the backward products. Legend: M rows, V vocabulary, H hidden.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _native
from ..rows import LogitRows, PpoRows, RowStats, Transform
from ..workspace import WORKSPACE

MIN_CHUNK = 16
"""Below this many rows the CPU's matrix libraries add in another order; shorter chunks are padded up to it."""


@dataclass(frozen=True)
class Head:
    """The output layer: `hidden @ weight.T + bias`."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Logits of `hidden` (m, H), in the front rows of `out` (chunk, V)."""
        rows = len(hidden)
        if rows < MIN_CHUNK:
            hidden = torch.cat([hidden, hidden.new_zeros(MIN_CHUNK - rows, hidden.shape[1])])
        z = out[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=z)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=z)
        return z[:rows]


@dataclass(frozen=True)
class HeadRows:
    """The rows that enter the head, gathered from all N."""

    hidden: Tensor  # (M, H), contiguous
    ids: Tensor  # (M,), int64
    transform: Transform
    index: Tensor | None  # (M,), where each came from; None: all of them, in order

    @classmethod
    def of(cls, hidden: Tensor, ids: Tensor, transform: Transform, keep: Tensor | None) -> "HeadRows":
        """Gathers the rows that `keep` (N,) marks."""
        if keep is None or bool(keep.all()):
            return cls(hidden.contiguous(), ids.contiguous(), transform, None)
        index = keep.nonzero().squeeze(1)
        return cls(hidden[index], ids[index], transform.rows(index), index)

    def chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, len(self.ids), size):
            yield slice(start, min(start + size, len(self.ids)))

    def logit_rows(self, logits: Tensor, rows: slice) -> LogitRows:
        return LogitRows(logits, self.ids[rows], self.transform.rows(rows))

    def take(self, x: Tensor | None) -> Tensor | None:
        """(N,) to (M,)."""
        return x if x is None or self.index is None else x[self.index]

    def spread(self, x: Tensor, n: int) -> Tensor:
        """(..., M) to (..., N), zeros elsewhere."""
        return x if self.index is None else x.new_zeros(*x.shape[:-1], n).index_copy_(-1, self.index, x)


@dataclass(frozen=True)
class Plan:
    """How many rows of logits exist at a time, how many are made at a time, and what the weight's gradient is summed in.

    A step of rows goes through logits, epilogue and the product into the hidden states while it lies in cache; the rows that
    have a gradient stay until `chunk` of them make one product into the weight. Half-precision products leave the library
    rounded, so each of those costs a float32 sum over [V, H]: chunks are large, and a batch of one chunk needs no sum.
    float32 products are added in place. float16 sums are float32 whatever their number, because rows that are not yet divided
    by the denominator reach beyond 65504. Made from shapes alone, so that a compiled graph knows the dtypes.
    """

    chunk: int
    step: int
    sum_dtype: torch.dtype

    @classmethod
    def of(cls, n: int, dtype: torch.dtype, chunk_tokens: int | None) -> "Plan":
        default, step = (512, 512) if dtype == torch.float32 else (2048, 256)
        chunk = max(chunk_tokens or default, MIN_CHUNK)
        one_product = n <= chunk and dtype == torch.bfloat16
        return cls(chunk, min(step, chunk), dtype if one_product else torch.float32)

    def buffer(self, rows: "HeadRows", vocab: int, *, keep: bool) -> Tensor:
        """Room for a chunk of logits, or for one step where nothing needs to stay."""
        size = max(min(self.chunk if keep else self.step, len(rows.ids)), MIN_CHUNK)
        return WORKSPACE.take((size, vocab), rows.hidden.dtype, rows.hidden.device)


class HeadGradients:
    """Gradients of the head's inputs, summed over chunks in float32 and not yet scaled."""

    def __init__(self, head: Head, n: int, rows: HeadRows, sum_dtype: torch.dtype, needs: tuple[bool, bool, bool]):
        self.head, self.rows = head, rows
        weight = head.weight
        # Rows that have no gradient are never written, so they must be zero beforehand.
        self.hidden = torch.zeros(n, weight.shape[1], device=weight.device) if needs[0] else None
        self.weight = _native.empty(weight.shape, sum_dtype, weight.device) if needs[1] else None
        self.bias = torch.zeros(len(weight), device=weight.device) if needs[2] else None
        self.first = True

    def add_rows(self, dlogits: Tensor, rows: Tensor) -> None:
        """Takes in the gradient of the logits (m, V) of the rows (m,), numbers among the M: all but the weight's."""
        if self.hidden is not None:
            target = rows if self.rows.index is None else self.rows.index[rows]
            self.hidden[target] = torch.mm(dlogits, self.head.weight).float()
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=torch.float32)

    def add_weight(self, dlogits: Tensor, rows: Tensor) -> None:
        """Takes in the weight's part of the gradient of the logits (m, V) of the rows (m,)."""
        transposed, hidden = dlogits.t(), self.rows.hidden[rows]
        if self.first and self.weight.dtype == dlogits.dtype:
            torch.mm(transposed, hidden, out=self.weight)
        elif self.weight.dtype == dlogits.dtype:
            self.weight.addmm_(transposed, hidden)
        else:
            if dlogits.dtype == torch.float16:
                hidden = hidden.float()
            for block in _blocks(len(self.weight), 8192):
                part = torch.mm(transposed[block].to(hidden.dtype), hidden)
                _native.accumulate(self.weight[block], part, first=self.first)
        self.first = False

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """d hidden (N, H), d weight (V, H), d bias (V,); None where not asked for."""
        if self.first and self.weight is not None:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


def _blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def head_stats(head: Head, rows: HeadRows, plan: Plan) -> RowStats:
    """Log-probs and entropy of every row: one product, no gradient."""
    stats = RowStats.empty(len(rows.ids), rows.hidden.device)
    buffer = plan.buffer(rows, len(head.weight), keep=False)
    for chunk in rows.chunks(plan.step):
        part = RowStats.empty(chunk.stop - chunk.start, rows.hidden.device)
        logits = head.logits(rows.hidden[chunk], buffer)
        _native.token_logprobs_forward(rows.logit_rows(logits, chunk), part)
        stats.buffer[:, chunk] = part.buffer
    return stats


Epilogue = Callable[[LogitRows, slice], Tensor]
"""Turns the logits of a chunk into their gradient in place; returns which of its rows have one, bool (m,)."""


def head_gradients(head: Head, rows: HeadRows, n: int, plan: Plan, needs: tuple[bool, bool, bool], epilogue: Epilogue):
    """One pass over the rows: logits, `epilogue`, backward products."""
    gradients = HeadGradients(head, n, rows, plan.sum_dtype, needs)
    buffer = plan.buffer(rows, len(head.weight), keep=needs[1])
    held: list[Tensor] = []  # which rows' gradients lie at the front of the buffer
    for chunk in rows.chunks(plan.step):
        filled = sum(map(len, held))
        if held and filled + max(chunk.stop - chunk.start, MIN_CHUNK) > len(buffer):
            gradients.add_weight(buffer[:filled], torch.cat(held))
            held, filled = [], 0
        logits = head.logits(rows.hidden[chunk], buffer[filled:])
        active = epilogue(rows.logit_rows(logits, chunk), chunk)
        front = _native.compact_rows(logits, active) + chunk.start
        if len(front):
            gradients.add_rows(logits[: len(front)], front)
            if needs[1]:
                held.append(front)
    if held:
        gradients.add_weight(buffer[: sum(map(len, held))], torch.cat(held))
    return gradients.results()


def ppo_pass(head: Head, rows: HeadRows, ppo: PpoRows, n: int, plan: Plan, needs: tuple[bool, bool, bool]):
    """Statistics and gradients in one pass: the row's own log-prob decides its coefficient."""
    stats = RowStats.empty(len(rows.ids), rows.hidden.device)
    if rows.index is not None:
        ppo = ppo.rows(rows.index)

    def epilogue(x: LogitRows, chunk: slice) -> Tensor:
        part = RowStats.empty(chunk.stop - chunk.start, rows.hidden.device)
        active = _native.ppo_epilogue(x, part, ppo.rows(chunk))
        stats.buffer[:, chunk] = part.buffer
        return active

    return stats, head_gradients(head, rows, n, plan, needs, epilogue)


def given_pass(
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

    def epilogue(x: LogitRows, chunk: slice) -> Tensor:
        g, h = (None if y is None else y[chunk].contiguous() for y in (grad_logprobs, grad_entropy))
        _native.token_logprobs_backward(x, RowStats(stats.buffer[:, chunk].contiguous()), x.logits, g, h)
        zero = torch.zeros(len(x.ids), dtype=torch.bool, device=x.ids.device)
        return (zero if g is None else g != 0) | (zero if h is None else h != 0)

    return head_gradients(head, rows, n, plan, needs, epilogue)
