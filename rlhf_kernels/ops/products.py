# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Tensor.split`.
"""The matrix products of the fused head, by the vendor's matrix library.

Legend: m rows, V vocabulary, H hidden, R rank of the low-rank term.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .quantised_weight import QuantisedWeight, Scratch

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
class Head:
    """The weights of the output layer `hidden @ weight.T + states @ low_weight.T + bias`."""

    weight: Tensor | QuantisedWeight  # (V, H)
    bias: Tensor | None  # (V,)
    low_weight: Tensor | None = None  # (V, R)
    scratch: list[Scratch] = field(default_factory=list[Scratch])
    """Memory for a tile of a quantised weight, after the first product."""

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return len(self.weight)

    @property
    def width(self) -> int:
        """Number of elements of a hidden state."""
        return self.weight.shape[1]

    def logits(self, hidden: Tensor, states: Tensor | None, out: Tensor, pad_to: int) -> Tensor:
        """Return the logits of `hidden` (m, H) in the first m rows of `out`, padding the products to `pad_to` rows.

        `states` (m, R) are the rows of the low-rank term.
        """
        rows = len(hidden)
        hidden = _padded(hidden, pad_to)
        z = out[: len(hidden)]
        for place, weight in self._tiles(hidden.dtype):
            _affine(hidden, weight, None if self.bias is None else self.bias[place], z[:, place])
        if self.low_weight is not None:
            assert states is not None
            product(_padded(states, pad_to), self.low_weight.t(), z, add=True)
        return z[:rows]

    def hidden_gradient(self, dlogits: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `dlogits @ weight` (m, H) in `dtype`, or in float32 if it is the sum over several tiles."""
        total = None
        for place, weight in self._tiles(dlogits.dtype):
            part = torch.empty(len(dlogits), self.width, dtype=dtype, device=dlogits.device)
            product(dlogits[:, place], weight, part)
            total = part if total is None else total.float().add_(part)
        assert total is not None
        return total

    def _tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows of the weight in `dtype` and their place."""
        if isinstance(self.weight, QuantisedWeight):
            if not self.scratch:  # new memory for each tile would take as long as dequantising it
                self.scratch.append(self.weight.scratch_of(dtype))
            yield from self.weight.tiles(dtype, self.scratch[0])
        else:
            yield slice(0, len(self.weight)), self.weight


def _padded(x: Tensor, rows: int) -> Tensor:
    """Return `x` with zeros after its rows, so that it has at least `rows`."""
    return x if len(x) >= rows else torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])


def _affine(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Compute `out = hidden @ weight.T + bias`."""
    if bias is not None and not has_products(hidden.dtype, hidden.device.type):
        out.copy_(bias)
        product(hidden, weight.t(), out, add=True)
    elif bias is not None and out.dtype == hidden.dtype:
        torch.addmm(bias, hidden, weight.t(), out=out)
    else:
        product(hidden, weight.t(), out)
        if bias is not None:
            out += bias
