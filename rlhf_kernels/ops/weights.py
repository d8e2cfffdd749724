# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Tensor.split`.
"""The weights of the output layer: in floating point, int8 or NF4, with a low-rank term; and the products with them.

Legend: m rows, N tokens, V vocabulary, H hidden, R rank of the low-rank term.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _native  # pyright: ignore[reportPrivateUsage]  # of this package
from . import checks

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of 4-bit NormalFloat (Dettmers et al. 2023, "QLoRA", appendix E)."""

TILE_BYTES = 16 * 2**20
"""Size of a tile in float32, which is small compared with a chunk of logits and large enough for an efficient product."""


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A frozen weight (V, H) of the output layer, in int8 or NF4.

    `linear_ppo_loss` and `linear_token_logprobs` accept it as `weight`. They compute float products with a tile of
    dequantised rows at a time, so that there is no float tensor of V x H elements. A value is computed in float32 and
    rounded once to the dtype of the hidden states. The weight has no gradient.
    """

    values: Tensor
    """int8 values (V, H), or two codes of NF4 per byte (V * H / 2,)."""
    scales: Tensor
    """One factor per row (V,), or per block of NF4 codes (V * H / block,)."""
    shape: tuple[int, int]
    """V and H."""
    block: int = 0
    """Consecutive NF4 codes that share a scale; 0 for int8."""

    @classmethod
    def int8(
        cls,
        values: Tensor,  # (V, H), int8
        scales: Tensor,  # (V,)
    ) -> QuantisedWeight:
        """Return the weight `values * scales[:, None]`.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        checks.floating("values", values, dims=(2,), what="[V, H]", dtypes=(torch.int8,))
        v, h = values.shape
        if v == 0 or h == 0:
            raise ValueError(f"values: got shape {checks.shape(values)}, expected V >= 1 and H >= 1")
        checks.tensor("scales", scales, like=values, expected=(v,), what="[V]")
        return cls(values.detach().contiguous(), scales.detach(), (v, h))

    @classmethod
    def nf4(
        cls,
        packed: Tensor,  # (V * H / 2,), uint8
        absmax: Tensor,  # (V * H / block,)
        vocabulary: int,
        hidden: int,
        *,
        block: int = 64,
    ) -> QuantisedWeight:
        """Return the weight whose element i, in row-major order, is `NF4[code i] * absmax[i // block]`.

        Codes 2j and 2j + 1 are the high and the low half of byte j, as in bitsandbytes. The table NF4 is that of Dettmers
        et al. 2023 (QLoRA, appendix E).

        Raises:
            ValueError: a shape, dtype or device that does not fit, or a block that does not divide V * H.
        """
        checks.number("vocabulary", vocabulary, least=1, integer=True)
        checks.number("hidden", hidden, least=1, integer=True)
        checks.number("block", block, least=2, integer=True)
        size = vocabulary * hidden
        if block % 2 or size % block:
            raise ValueError(f"block: got {block}, expected an even number that divides V * H = {size}")
        checks.floating("packed", packed, dims=(1, 2), what="[V * H / 2]", dtypes=(torch.uint8,))
        if packed.numel() != size // 2:
            raise ValueError(f"packed: got {packed.numel()} bytes, expected V * H / 2 = {size // 2}")
        what = "[V * H / block]"
        checks.tensor("absmax", absmax, like=packed, expected=(size // block,), what=what)
        return cls(packed.detach().reshape(-1), absmax.detach(), (vocabulary, hidden), block)

    @property
    def device(self) -> torch.device:
        """Device of the values and the scales."""
        return self.values.device

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, begin: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dequantised rows from `begin` to `end`, exclusive, in `dtype`."""
        return self._write(begin, end, Scratch.of(self, end - begin, dtype))

    def tiles(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield the places of consecutive rows, at most `TILE_BYTES` and at least one row each, and their values in `dtype`.

        With `scratch`, from `scratch_of`, the values are valid until the next step of any iterator with the same memory.
        """
        size = self._tile_rows()
        for begin in range(0, len(self), size):
            place = slice(begin, min(begin + size, len(self)))
            if scratch is None:
                yield place, self.rows(place.start, place.stop, dtype)
            else:
                yield place, self._write(place.start, place.stop, scratch)

    def scratch_of(self, dtype: torch.dtype) -> Scratch:
        """Return the memory for one tile in `dtype`."""
        return Scratch.of(self, min(self._tile_rows(), len(self)), dtype)

    def _tile_rows(self) -> int:
        return max(1, TILE_BYTES // (4 * self.shape[1]))

    def _write(self, begin: int, end: int, scratch: Scratch) -> Tensor:
        hidden, block = self.shape[1], self.block
        if not block:
            wide = scratch.wide[: (end - begin) * hidden].view(-1, hidden).copy_(self.values[begin:end])
            wide.mul_(self.scales[begin:end, None])
        else:
            first, last = begin * hidden // block, -(-end * hidden // block)  # blocks that the rows touch
            count = (last - first) * block
            codes = scratch.codes[: count // 2].copy_(self.values[first * block // 2 : last * block // 2])
            blocks = scratch.wide[:count]
            torch.index_select(_pairs(self.device), 0, codes, out=blocks.view(torch.int64))
            blocks.view(-1, block).mul_(self.scales[first:last, None])
            offset = begin * hidden - first * block
            wide = blocks[offset : offset + (end - begin) * hidden].view(-1, hidden)
        return wide if scratch.rows is None else scratch.rows[: end - begin].copy_(wide)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the whole weight (V, H) in `dtype`."""
        return self.rows(0, len(self), dtype)

    def first(self, rows: int) -> QuantisedWeight:
        """Return the weight of the first `rows` ids, without a copy."""
        return replace(self, shape=(rows, self.shape[1]))


class Scratch(NamedTuple):
    """The memory in which rows are dequantised."""

    codes: Tensor  # int32, for the bytes of NF4 codes
    wide: Tensor  # float32
    rows: Tensor | None  # (rows, H), in the dtype of the result; None: it is float32

    @classmethod
    def of(cls, weight: QuantisedWeight, rows: int, dtype: torch.dtype) -> Scratch:
        """Return uninitialised memory for `rows` rows of `weight` in `dtype`."""
        hidden, device = weight.shape[1], weight.device
        count = rows * hidden + 2 * weight.block  # the first and the last block may begin or end within a row
        codes = torch.empty(count // 2 if weight.block else 0, dtype=torch.int32, device=device)
        wide = _native.empty((count,), torch.float32, device)
        return cls(
            codes, wide, None if dtype == torch.float32 else torch.empty(rows, hidden, dtype=dtype, device=device)
        )


@cache
def _pairs(device: torch.device) -> Tensor:  # (256,), int64
    """Return the two float32 values of each byte of NF4 codes, as one number, which a CPU looks up faster than two.

    Cached, because a copy to the device synchronizes with it.
    """
    table = torch.tensor(NF4)
    pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)
    return pairs.view(torch.int64).flatten().to(device)


class LowRank(NamedTuple):
    """A low-rank term of the logits, such as an adapter on the output layer: `logits += states @ weight.T`.

    For LoRA, `W + scale * B A` is the weight of the layer, `states = scale * hidden @ A.T` and `weight = B`; `LowRank.lora`
    computes the states. No tensor of the size of W is needed. Several adapters are one term: concatenate states and
    weights along R.
    """

    states: Tensor  # (..., R), differentiable
    weight: Tensor  # (V, R), differentiable

    @classmethod
    def lora(
        cls,
        hidden: Tensor,  # (..., H), differentiable
        lora_a: Tensor,  # (R, H), differentiable
        lora_b: Tensor,  # (V, R), differentiable
        scale: float = 1.0,
        *,
        mask: Tensor | None = None,  # (...), bool
    ) -> LowRank:
        """Return the term of the LoRA adapter `W + scale * B A` (Hu et al. 2021, eq. 3).

        Hidden states may be NaN where `mask` is False. The states have the dtype of `hidden`.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        checks.floating("hidden", hidden, dims=tuple(range(1, 8)), what="[..., H]")
        checks.floating("lora_a", lora_a, dims=(2,), what="[R, H]")
        rank = lora_a.shape[0]
        checks.tensor("lora_a", lora_a, like=hidden, expected=(rank, hidden.shape[-1]), what="[R, H]")
        checks.floating("lora_b", lora_b, dims=(2,), what="[V, R]")
        checks.tensor("lora_b", lora_b, like=hidden, expected=(lora_b.shape[0], rank), what="[V, R]")
        checks.number("scale", scale)
        states = F.linear(unmasked(hidden, mask).to(lora_a.dtype), lora_a) * scale
        return cls(states.to(hidden.dtype), lora_b.to(hidden.dtype))


def unmasked(hidden: Tensor, mask: Tensor | None) -> Tensor:  # (..., H)
    """Return the hidden states with zeros where the mask (...) is False, so that NaN there reaches no gradient."""
    if mask is None:
        return hidden
    checks.mask("mask", mask, like=hidden, expected=hidden.shape[:-1], what="the shape of ids")
    return torch.where(mask[..., None], hidden, 0)


# ---- products ----

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
