"""Which sequence has which pages of keys and values: bookkeeping on the host, without tensors.

A page is claimed when a sequence grows into it, not when the sequence begins: answers are often several times shorter than the
longest one allowed, and a pool that kept room for the longest answer of each would run a fraction of the sequences. The price
is that the pool can run out under way. Then the youngest sequence leaves and begins again later. The oldest one never leaves,
and the pool holds its longest answer, so sampling ends.
"""

from __future__ import annotations

from collections.abc import Sequence


def pages_of(tokens: int, page_size: int) -> int:
    """Return how many pages `tokens` tokens fill, the last one in part."""
    return -(-tokens // page_size)


class Pages:
    """A free list with counts of holders; pages are numbers from `first` on."""

    def __init__(self, count: int, first: int = 0) -> None:
        self._free = list(range(first + count - 1, first - 1, -1))
        self._holders = [0] * (first + count)

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def claim(self) -> int:
        """A free page, held once."""
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        """One more holder for each."""
        for page in pages:
            assert self._holders[page] > 0, page
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; a page without any is free."""
        for page in pages:
            assert self._holders[page] > 0, page
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def holders(self, page: int) -> int:
        """How many sequences read it."""
        return self._holders[page]


class Sequences:
    """The pages of the sequence in each slot, in the order of its tokens, and how long it is."""

    def __init__(self, pages: Pages, page_size: int, slots: int) -> None:
        self.pages, self.page_size = pages, page_size
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.lengths = [0] * slots
        self._ages = [0] * slots
        self._admitted = 0

    def pages_of(self, tokens: int) -> int:
        """How many pages they fill, the last one in part."""
        return pages_of(tokens, self.page_size)

    def admit(self, slot: int, length: int, like: int | None = None) -> None:
        """A prompt of `length` tokens comes to an empty slot; it shares all pages of slot `like`, which has the same prompt."""
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
        """The slot's sequence is gone."""
        self.pages.release(self.held[slot])
        self.held[slot], self.lengths[slot] = [], 0

    def move(self, source: int, target: int) -> None:
        """The sequence in `source` goes on in `target`, whose own is gone."""
        self.drop(target)
        for of_slot in (self.held, self.lengths, self._ages):
            of_slot[source], of_slot[target] = of_slot[target], of_slot[source]

    def needed(self, slots: Sequence[int]) -> int:
        """Free pages that one more token for each of these slots takes; between them they hold all that is held."""
        new = sum(self.lengths[slot] % self.page_size == 0 for slot in slots)
        begun = (self.held[slot][-1] for slot in slots if self.lengths[slot] % self.page_size)
        # Of the holders of a page that is full in part, all but the last to write take a copy.
        return new + sum(self.pages.holders(page) - 1 for page in set(begun))

    def make_room(self, count: int) -> list[int]:
        """Drop the youngest of the first `count` sequences until all others have room for a token; returns their slots."""
        staying, dropped = list(range(count)), []
        while self.needed(staying) > self.pages.free:
            youngest = max(staying, key=self._ages.__getitem__)
            assert len(staying) > 1, "the pool holds one sequence of any length"
            staying.remove(youngest)
            dropped.append(youngest)
            self.drop(youngest)
        return dropped

    def grow(self, slot: int) -> tuple[int, int, int | None] | None:
        """Room for one more token: None, or (place, page that comes there, page to copy into it first)."""
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
