"""Endless streams over a data set, of which any part can be asked for: a position is all that a resumed run needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch


def shuffled_stream(items: int, seed: int) -> Callable[[int, int], list[int]]:
    """`take(first, count)`: indices number `first` to `first + count`; a new random order for every pass over the items."""

    @lru_cache(maxsize=2)
    def order(passes: int) -> list[int]:
        stream = torch.Generator().manual_seed((seed * 1_000_003 + passes) % 2**63)
        return torch.randperm(items, generator=stream).tolist()

    def take(first: int, count: int) -> list[int]:
        places = (divmod(number, items) for number in range(first, first + count))
        return [order(passes)[place] for passes, place in places]

    return take
