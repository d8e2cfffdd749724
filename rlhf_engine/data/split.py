"""Training and validation parts of a data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np

from rlhf_engine.config import RunConfig
from rlhf_engine.data.store import Selection

Made = TypeVar("Made")


def split(
    items: Sequence[Made], prompt: Callable[[Made], Sequence[int]], config: RunConfig, source: str, kind: str
) -> tuple[Sequence[Made], Sequence[Made]]:
    """Training and validation parts with no prompt in common; `prompt` gives an item's, as token ids.

    Prompts are taken in the order of a hash of the seed and their ids, so that one file's validation prompts are mostly
    another file's, until `data.validation_share` of the items is held out. Both parts have a prompt. Raises ValueError
    for fewer than two, which says that they are `kind` and come from `source`.
    """
    hashes = np.fromiter((_hash(config.seed, prompt(item)) for item in items), np.uint64, len(items))
    # Stable: the items of a prompt stay as they came.
    order = np.argsort(hashes, kind="stable")
    _, sizes = np.unique(hashes, return_counts=True)
    if len(sizes) < 2:
        raise ValueError(
            f"{source}: got {len(items)} {kind} of {len(sizes)} prompts, expected at least 2 prompts, to train on one and "
            "validate on another"
        )
    wanted, held, trained = config.data.validation_share * len(items), int(sizes[0]), False
    held_out = np.zeros(len(sizes), dtype=bool)
    held_out[0] = True
    for number, size in enumerate(sizes[1:], start=1):
        full = held + size / 2 > wanted or (number == len(sizes) - 1 and not trained)
        held_out[number], trained = not full, trained or full
        held += 0 if full else int(size)
    validated = np.repeat(held_out, sizes)
    return Selection(items, order[~validated]), Selection(items, order[validated])


def _hash(seed: int, ids: Sequence[int]) -> int:
    """Where a prompt stands in the order of a seed; two prompts with one hash, which no data set has, stay together."""
    return int.from_bytes(blake2b(repr((seed, tuple(ids))).encode()).digest()[:8], "big")
