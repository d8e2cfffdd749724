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
    """Return training and validation parts with no prompt in common; `prompt` returns the token ids of an item's prompt.

    Prompts are held out in the order of a hash of the seed and their ids, until `data.validation_share` of the items is held
    out. Files with common prompts thus have mostly the same validation prompts. Both parts contain at least one prompt.

    Raises:
        ValueError: there are fewer than two prompts. The message names the items as `kind` and their file as `source`.
    """
    hashes = np.fromiter((_hash(config.seed, prompt(item)) for item in items), np.uint64, len(items))
    # A stable sort keeps the order of the items of a prompt.
    order = np.argsort(hashes, kind="stable")
    _, sizes = np.unique(hashes, return_counts=True)
    if len(sizes) < 2:
        raise ValueError(
            f"{source}: got {len(items)} {kind} of {len(sizes)} prompts, expected at least 2 prompts, one for "
            "training and one for validation"
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
    """Return the sort key of a prompt for a seed. Prompts with equal hashes, which are improbable, are in the same part."""
    return int.from_bytes(blake2b(repr((seed, tuple(ids))).encode()).digest()[:8], "big")
