"""A weight of the output layer in int8 or NF4, which is dequantised a tile of rows at a time.

Legend: V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

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
        if not self.block:
            rows = self.values[begin:end].float()
            return rows.mul_(self.scales[begin:end, None].float()).to(dtype)
        hidden, block = self.shape[1], self.block
        first, last = begin * hidden // block, -(-end * hidden // block)  # blocks that the rows touch
        codes = self.values[first * block // 2 : last * block // 2].int()
        blocks = _pairs(self.device).index_select(0, codes).view(-1, block)
        blocks.mul_(self.scales[first:last, None].float())
        offset = begin * hidden - first * block
        return blocks.view(-1)[offset : offset + (end - begin) * hidden].view(-1, hidden).to(dtype)

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the places of consecutive rows, at most `TILE_BYTES` and at least one row each, and their values in `dtype`."""
        size = max(1, TILE_BYTES // (4 * self.shape[1]))
        for begin in range(0, len(self), size):
            place = slice(begin, min(begin + size, len(self)))
            yield place, self.rows(place.start, place.stop, dtype)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the whole weight (V, H) in `dtype`."""
        return self.rows(0, len(self), dtype)

    def first(self, rows: int) -> QuantisedWeight:
        """Return the weight of the first `rows` ids, without a copy."""
        return replace(self, shape=(rows, self.shape[1]))


@cache
def _pairs(device: torch.device) -> Tensor:  # (256, 2)
    """Return the two values of each byte of NF4 codes. Cached, because a copy to the device synchronizes with it."""
    table = torch.tensor(NF4)
    return torch.stack((table.repeat_interleave(16), table.repeat(16)), 1).to(device)
