"""The fused head's matrix products, by the vendor's library, and how much of them is made at a time."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MIN_CHUNK = 16
"""Below this many rows the CPU's matrix libraries add in another order; shorter chunks are padded up to it."""

GPU_LOGITS_BYTES = 2**30
"""Room for a chunk of float32 logits on a GPU, from which its rows follow. Every chunk reads and writes the float32 sum of the
weight's gradient, which takes half as long as the product itself with 1024 rows of a vocabulary of 128k."""

_PART = 1024
"""Rows, columns or terms of a product that are turned into float32 at a time."""


_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@cache
def has_products(dtype: torch.dtype, device: str) -> bool:
    """Whether torch has products of `dtype` factors on a device of type `device` that are no slower than float32's.

    False for half precision on a processor without instructions for it, or where torch was built without oneDNN and cannot
    tell: the loops that it has then take several times as long.
    """
    if device != "cpu" or dtype not in _ASKED:
        return True
    asked = getattr(torch.ops.mkldnn, _ASKED[dtype], None) if torch.backends.mkldnn.is_available() else None
    return asked is not None and bool(asked())


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """`out = a @ b`, or `out += a @ b`; a float32 `out` of half-precision factors is not rounded on the way."""
    if a.dtype in (torch.bfloat16, torch.float16) and not has_products(a.dtype, a.device.type):
        _product_in_float32(a, b, out, add=add)
    elif out.dtype == a.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif a.is_cuda and add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # where Triton is interpreted: CPU libraries have no such product
        product(a.float(), b.float(), out, add=add)


def _product_in_float32(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """`product` of the same factors with float32 sums, rounded once; the longest side comes in parts."""
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
        # In place, which autocast leaves as it is.
        total = part_out.float() if add else a.new_zeros(part_out.shape)
        part_out.copy_(total.addmm_(a, part_b.float()))


@dataclass(frozen=True)
class Plan:
    """How many rows of logits exist at a time, how many are made at a time, and in what they and the sums are kept.

    A step of rows goes through logits, epilogue and the product into the hidden states while it lies in cache; the rows that
    have a gradient stay until `chunk` of them make one product into the weight. Made from shapes alone, so that a compiled
    graph knows the dtypes.

    On CPU half-precision products leave the library rounded, so each into the weight costs a float32 sum over [V, H]:
    chunks are large, and a batch of one chunk needs no sum. float32 products are added in place. float16 sums are float32
    whatever their number, because rows that are not yet divided by the denominator reach beyond 65504.

    On a GPU (`wide`) half-precision factors make float32 logits, so that a log-prob carries no bf16 rounding, and float32
    sums inside the product. A row's bits follow from the shape of its product, so that shape is one for every N.
    """

    chunk: int
    step: int
    pad_to: int  # rows of the smallest product of logits
    logits_dtype: torch.dtype
    sum_dtype: torch.dtype
    wide: bool
    compact: bool  # rows without a gradient enter no backward product, and masked rows none at all

    @classmethod
    def of(
        cls, n: int, vocab: int, dtype: torch.dtype, backend: str, chunk_tokens: int | None, compact: bool | None
    ) -> "Plan":
        if backend != "cpu":
            rows = max(128, min(4096, GPU_LOGITS_BYTES // (4 * vocab) // 128 * 128))
            chunk = max(chunk_tokens or rows, MIN_CHUNK)
            return cls(chunk, chunk, chunk, torch.float32, torch.float32, True, bool(compact))
        default, step = (512, 512) if dtype == torch.float32 else (2048, 256)
        chunk = max(chunk_tokens or default, MIN_CHUNK)
        one_product = n <= chunk and dtype == torch.bfloat16
        return cls(chunk, min(step, chunk), MIN_CHUNK, dtype, dtype if one_product else torch.float32, False, True)

    def rows(self, n: int | None, *, keep: bool) -> int:
        """Rows of logits in memory for `n` rows (None: any number) where a chunk's gradients stay, or those of one step."""
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
    """Bytes of logits that the fused head holds at a time, for `lend_workspace` and for whoever counts memory.

    `tokens` rows that count of hidden states of `dtype`, None for any number; `gradient` whether the weight asks for one;
    `backend` "cpu", "triton" or "cuda". The reference backend makes all logits at once and takes nothing from the workspace.
    """
    if backend not in ("cpu", "triton", "cuda"):
        raise ValueError(f"backend: got {backend!r}, expected 'cpu', 'triton' or 'cuda'")
    plan = Plan.of(tokens or 0, vocab, dtype, backend, chunk_tokens, None)
    return plan.rows(tokens, keep=gradient) * vocab * plan.logits_dtype.itemsize
