"""Endless shuffled streams over a data set with random access, so that a resumed run needs only a position."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


def shuffled(items: int, seed: int, tag: str, number: int) -> Tensor:  # (items,)
    """Return permutation `number` of the stream `tag`, which depends only on the arguments and not on other random draws.

    Streams of one run have different tags, because without them data sets of the same size would be read in the same order.
    """
    digest = hashlib.blake2b(f"{tag} {seed} {number}".encode(), digest_size=8).digest()
    stream = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
    return torch.randperm(items, generator=stream)


def shuffled_stream(items: int, seed: int, tag: str) -> Callable[[int, int], list[int]]:
    """Return `take(first, count)`, which returns `count` indices of the stream from position `first`.

    Every pass over the items has a different random order.
    """

    @lru_cache(maxsize=2)
    def order(passes: int) -> Tensor:
        return shuffled(items, seed, tag, passes)

    def take(first: int, count: int) -> list[int]:
        places = (divmod(number, items) for number in range(first, first + count))
        return [int(order(passes)[place]) for passes, place in places]

    return take
