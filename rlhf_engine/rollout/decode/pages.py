"""The page table of a paged cache, kept on the host without tensors.

A page is allocated when a sequence grows into it, not when the sequence begins. Responses are often several times shorter than
the limit, so a pool that reserved pages for the longest possible responses would hold a fraction of the sequences. The pool can
therefore run out of pages during decoding. Then the youngest sequence is preempted and regenerated later. The oldest one is
never preempted, and the pool has enough pages for the longest possible sequence, so sampling terminates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_engine.rollout.decode.protocol import kv_bytes

PAGE_SIZE = 64
"""Tokens per page. A sequence leaves half a page unused on average, and a tile of the kernel spans one or two pages."""


def pool_bytes(numbers: int, pages: int, dtype: torch.dtype, page_size: int = PAGE_SIZE) -> int:
    """Return the bytes of `pages` pages and of page 0, which no sequence uses; a token has `numbers` numbers."""
    return kv_bytes(numbers, (1 + pages) * page_size, dtype)


def pages_of(tokens: int, page_size: int) -> int:
    """Return the number of pages of `tokens` tokens, including a partly filled last page."""
    return -(-tokens // page_size)


class Pages:
    """A free list of pages with reference counts; page numbers begin at `first`."""

    def __init__(self, count: int, first: int = 0) -> None:
        self._free = list(range(first + count - 1, first - 1, -1))
        self._holders = [0] * (first + count)

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def claim(self) -> int:
        """Allocate a page with a reference count of 1 and return its number."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each of `pages`."""
        for page in pages:
            assert self._holders[page] > 0, page
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference of each of `pages`; a page without references becomes free."""
        for page in pages:
            assert self._holders[page] > 0, page
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def holders(self, page: int) -> int:
        """Return the reference count of a page."""
        return self._holders[page]


class Sequences:
    """The length and the pages, in token order, of the sequence in each slot."""

    def __init__(self, pages: Pages, page_size: int, slots: int) -> None:
        self.pages, self.page_size = pages, page_size
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.lengths = [0] * slots
        self._ages = [0] * slots
        self._admitted = 0

    def pages_of(self, tokens: int) -> int:
        """Return the number of pages of `tokens` tokens, including a partly filled last page."""
        return pages_of(tokens, self.page_size)

    def admit(self, slot: int, length: int, like: int | None = None) -> None:
        """Allocate pages for a prompt of `length` tokens in an empty slot, or share those of slot `like` with that prompt."""
        assert not self.held[slot], slot
        if like is None:
            self.held[slot] = [self.pages.claim() for _ in range(self.pages_of(length))]
        else:
            assert self.lengths[like] == length, (slot, like)
            self.held[slot] = list(self.held[like])
            self.pages.share(self.held[slot])
        self._admitted += 1
        self.lengths[slot], self._ages[slot] = length, self._admitted

    def drop(self, slot: int) -> None:
        """Drop the sequence in `slot` and release its pages."""
        self.pages.release(self.held[slot])
        self.held[slot], self.lengths[slot] = [], 0

    def move(self, source: int, target: int) -> None:
        """Move the sequence in slot `source` to slot `target` and drop the sequence that was in `target`."""
        self.drop(target)
        by_slot: list[Any] = [self.held, self.lengths, self._ages]
        for of_slot in by_slot:
            of_slot[source], of_slot[target] = of_slot[target], of_slot[source]

    def needed(self, slots: Sequence[int]) -> int:
        """Return how many free pages one more token in each of `slots` needs; no other slot may have a sequence."""
        new = sum(self.lengths[slot] % self.page_size == 0 for slot in slots)
        begun = (self.held[slot][-1] for slot in slots if self.lengths[slot] % self.page_size)
        # Copy on write: all sequences that share a partly filled page copy it, except the last one to write.
        return new + sum(self.pages.holders(page) - 1 for page in set(begun))

    def preempt(self, count: int) -> list[int]:
        """Preempt the youngest of the first `count` sequences until the others have pages for a token; return the slots."""
        staying, dropped = list(range(count)), []
        while self.needed(staying) > self.pages.free:
            youngest = max(staying, key=self._ages.__getitem__)
            assert len(staying) > 1, "the pool has pages for one sequence of any length"
            staying.remove(youngest)
            dropped.append(youngest)
            self.drop(youngest)
        return dropped

    def grow(self, slot: int) -> tuple[int, int, int | None] | None:
        """Add one token to the sequence in `slot`.

        Return (index in the table, new page there, page to copy into it or None), or None if the last page has space.
        """
        place, begun = divmod(self.lengths[slot], self.page_size)
        self.lengths[slot] += 1
        held = self.held[slot]
        if not begun:
            held.append(self.pages.claim())
            return place, held[place], None
        shared = held[place]
        if self.pages.holders(shared) == 1:
            return None
        held[place] = self.pages.claim()
        self.pages.release([shared])
        return place, held[place], shared
