"""A weight of the output layer in int8 or NF4, which is dequantised a tile of rows at a time.

Legend: V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

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
