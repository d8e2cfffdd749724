"""Endless streams over a data set, of which any part can be asked for: a position is all that a resumed run needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def shuffled(items: int, seed: int, tag: str, number: int) -> Tensor:  # (items,)
    """Order `number` of the stream `tag`: a function of these alone, so nothing is saved and no other draw can shift it.

    Streams of one run have different tags; with the seed alone, data sets of one size would be read in the same order.
    """
    digest = hashlib.blake2b(f"{tag} {seed} {number}".encode(), digest_size=8).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
    return torch.randperm(items, generator=stream)


def shuffled_stream(items: int, seed: int, tag: str) -> Callable[[int, int], list[int]]:
    """`take(first, count)`: indices number `first` to `first + count`; a new random order for every pass over the items."""

    @lru_cache(maxsize=2)
    def order(passes: int) -> Tensor:
        return shuffled(items, seed, tag, passes)

    def take(first: int, count: int) -> list[int]:
        places = (divmod(number, items) for number in range(first, first + count))
        return [int(order(passes)[place]) for passes, place in places]

    return take
