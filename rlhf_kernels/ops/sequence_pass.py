# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# torch does not declare the type of `Tensor.tolist`.
"""Gradients of the head for coefficients that depend on all rows of a sequence, or that several kernels compute, in blocks.

The logits of a block are computed once: statistics, the coefficients of the block's rows, and the gradient that overwrites the
logits. A sequence that does not fit in the memory for logits needs a separate pass for its log-probs first.

Legend: N tokens, B sequences, V vocabulary.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import Kernels
from ..launch_args import LogitRows, RowStats, Sequences
from .head import HeadGradients, HeadRows, add_gradients, given_epilogue, head_stats, write_gradient
from .objective import ObjectiveTerms

TakeRows = Callable[[Tensor], HeadRows]
"""Returns the rows of the head where a mask (N,) is True."""


class Block(NamedTuple):
    """Consecutive rows that are whole sequences."""

    rows: slice
    sequences: Sequences


class Split(NamedTuple):
    """The rows whose logits are computed once, in blocks, and the rows of sequences that need a pass for log-probs first."""

    blocks: list[Block]
    keep: Tensor  # (N,), bool: the rows of the blocks
    rest: Tensor | None  # (N,), bool; None: no row

    @classmethod
    def of_unmasked(cls, terms: ObjectiveTerms, most: int, size: int) -> "Split":
        """Return blocks of the unmasked rows for sequences of at most `most` of them; the host reads their lengths.

        A block has several sequences of together at most `size` rows, or one longer sequence.
        """
        mask, sequences = terms.tokens, terms.sequences
        sequences.check(len(mask))
        lengths = sequences.lengths(mask)
        fits = lengths <= most
        inside = sequences.per_token(fits, len(mask))
        blocks = [_block(*run, mask.device) for run in _runs(lengths[fits].tolist(), size)]
        return cls(blocks, mask & inside, None if bool(fits.all()) else mask & ~inside)

    @classmethod
    def of_padded(cls, terms: ObjectiveTerms, most: int) -> "Split":
        """Return blocks of all rows if sequences have one length of at most `most`, so that the host need not read it."""
        mask, length = terms.tokens, max(terms.sequences.length, 1)
        if terms.cu_seqlens is not None or length > most:
            return cls([], mask, mask)
        size = most // length * length
        rows = [slice(start, min(start + size, len(mask))) for start in range(0, len(mask), size)]
        return cls([Block(x, Sequences((x.stop - x.start) // length, length, None)) for x in rows], mask, None)


def _runs(lengths: list[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Yield first row and lengths of consecutive sequences of together at most `size` rows, or of one longer sequence."""
    start, run = 0, list[int]()
    for length in lengths:
        if run and sum(run) + length > size:
            yield start, run
            start, run = start + sum(run), []
        run.append(length)
    if sum(run):
        yield start, run


def _block(start: int, lengths: list[int], device: torch.device) -> Block:
    """Return the block of sequences with these lengths from row `start` on."""
    ends = list(accumulate(lengths, initial=0))
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    return Block(slice(start, start + ends[-1]), Sequences(len(lengths), 0, offsets))


def block_pass(gradients: HeadGradients, take: TakeRows, terms: ObjectiveTerms) -> RowStats:
    """Add the gradients of all rows in blocks, and return the statistics of the N rows; three products per row."""
    rows = take(terms.tokens)
    chunks = list(rows.chunks(gradients.plan.step))
    blocks = [Block(rows, Sequences(1, rows.stop - rows.start, None)) for rows in chunks]
    return RowStats(rows.spread(_add_blocks(gradients, rows, terms, blocks), len(terms.tokens)))


def sequence_pass(gradients: HeadGradients, take: TakeRows, terms: ObjectiveTerms) -> RowStats:
    """Add the gradients of all rows in blocks of whole sequences, and return the statistics of the N rows.

    Where the plan is compact, or all sequences have the same length, the host knows where sequences begin. Those that fit in
    the memory for logits cost three products per row. Others, and packed sequences without `compact` on a GPU, cost four.
    """
    needs, plan, kernels = gradients.needs, gradients.plan, gradients.kernels
    most = plan.rows(None, keep=needs.weight) if any(needs) else 0  # without gradients, one pass is enough
    split = Split.of_unmasked(terms, most, plan.step) if plan.compact else Split.of_padded(terms, most)
    stats = torch.zeros(4, len(terms.tokens), device=terms.tokens.device)
    if split.blocks:
        rows = take(split.keep)
        stats = rows.spread(_add_blocks(gradients, rows, terms, split.blocks), len(terms.tokens))
    if split.rest is not None:
        rows = take(split.rest)
        stats = stats + rows.spread(head_stats(kernels, gradients.head, rows, plan).buffer, len(terms.tokens))
        if any(needs):
            slope = _slope(kernels, terms, stats[0])
            add_given(gradients, take, terms, RowStats(stats), slope, split.rest)
    return RowStats(stats)


def _add_blocks(gradients: HeadGradients, rows: HeadRows, terms: ObjectiveTerms, blocks: list[Block]) -> Tensor:
    """Add the gradients of the blocks, and return the statistics of their rows, (4, M)."""
    kernels, stats = gradients.kernels, RowStats.empty(len(rows.ids), rows.hidden.device)
    sequences = {block.rows.start: block.sequences for block in blocks}

    def epilogue(x: LogitRows, chunk: slice, out: Tensor) -> Tensor:
        part = RowStats.empty(chunk.stop - chunk.start, x.ids.device)
        kernels.token_logprobs_forward(x, part)
        stats.buffer[:, chunk] = part.buffer
        index = chunk if rows.index is None else rows.index[chunk]
        block = _terms_of(terms, index, sequences[chunk.start])
        slope = _slope(kernels, block, part.logprobs)
        return write_gradient(kernels, x, part, slope, block.entropy_slope(), out)

    add_gradients(gradients, rows, [block.rows for block in blocks], epilogue)
    return stats.buffer


def _terms_of(terms: ObjectiveTerms, index: Tensor | slice, sequences: Sequences) -> ObjectiveTerms:
    """Return the terms, except the value loss, of the tokens that `index` selects, which are `sequences`."""
    names = ("old_logprobs", "advantages", "weights", "ref_logprobs", "row_weight", "mask")
    taken = {name: x[..., index].contiguous() for name in names if (x := getattr(terms, name)) is not None}
    bounds: dict[str, Any] = {
        "others": terms.others.rows(index),
        "num_sequences": sequences.count,
        "length": sequences.length,
        "cu_seqlens": sequences.cu_seqlens,
    }
    return terms._replace(**taken, **bounds)


def _slope(kernels: Kernels, terms: ObjectiveTerms, logprobs: Tensor) -> Tensor:
    """Return d loss / d log-prob of each token, times the policy's denominator."""
    return terms.sums(kernels, logprobs, None, None, None, None)[0]


def add_given(
    gradients: HeadGradients,
    take: TakeRows,
    terms: ObjectiveTerms,
    stats: RowStats,
    slope: Tensor,  # (N,)
    keep: Tensor,  # (N,), bool
    scale: Tensor | None = None,  # ()
) -> None:
    """Add the gradients of the rows in `keep` for known statistics and slopes; the logits are computed again.

    Rows without a gradient are left out if the plan is compact. `scale` divides the gradients.
    """
    entropy_slope = terms.entropy_slope()
    if scale is not None:
        slope, entropy_slope = slope / scale, None if entropy_slope is None else entropy_slope / scale
    if gradients.plan.compact:
        keep = keep & (slope != 0 if entropy_slope is None else (slope != 0) | (entropy_slope != 0))
    rows = take(keep)
    taken = RowStats(rows.take(stats.buffer)), rows.take(slope), rows.take(entropy_slope)
    add_gradients(gradients, rows, rows.chunks(gradients.plan.step), given_epilogue(gradients.kernels, *taken))
