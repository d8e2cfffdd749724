"""The page table: examples by hand, and random operations against a model of the tokens in each page."""

import random

import pytest

from rlhf_engine.rollout.decode.pages import Pages, Sequences


def test_pages_without_references_are_free():
    pages = Pages(3, first=1)
    a, b = pages.claim(), pages.claim()
    assert {a, b} < {1, 2, 3} and pages.free == 1
    pages.share([a])
    pages.release([a, b])
    assert pages.free == 2 and pages.holders(a) == 1
    pages.release([a])
    assert pages.free == 3
    with pytest.raises(AssertionError):
        pages.release([a])


def test_samples_of_one_prompt_share_its_pages():
    """A prompt of 6 tokens with pages of 4: two samples share 2 pages, and the first to write to the second page copies it."""
    sequences = Sequences(Pages(5), 4, slots=3)
    sequences.admit(0, 6)
    sequences.admit(1, 6, like=0)
    full, begun = sequences.held[0]
    assert sequences.held[1] == [full, begun] and sequences.pages.free == 3
    assert sequences.needed([0, 1]) == 1
    place, page, source = sequences.grow(0)
    assert (place, source) == (1, begun) and sequences.held[0] == [full, page] and page != begun
    assert sequences.grow(1) is None and sequences.held[1] == [full, begun] and sequences.lengths == [7, 7, 0]
    assert [sequences.grow(slot) for slot in (0, 1)] == [None, None]
    assert sequences.needed([0, 1]) == 2 and sequences.pages.free == 2
    place, page, source = sequences.grow(1)
    assert (place, source) == (2, None) and sequences.held[1] == [full, begun, page]
    sequences.drop(0)
    assert sequences.pages.free == 2 and sequences.pages.holders(full) == 1
    sequences.move(1, 2)
    assert sequences.held == [[], [], [full, begun, page]] and sequences.lengths == [0, 0, 9]


def test_the_youngest_sequences_are_preempted():
    """Six pages of 2 tokens, three sequences of 2, 2 and 4 tokens: two pages are free, and all three sequences need one."""
    sequences = Sequences(Pages(6), 2, slots=4)
    for slot, length in ((2, 2), (0, 2), (1, 4)):
        sequences.admit(slot, length)
    assert sequences.preempt(3) == [1]
    assert sequences.held[1] == [] and sequences.pages.free == 4 and sequences.preempt(3) == []
    sequences = Sequences(Pages(4), 2, slots=3)
    for slot, length in ((2, 4), (0, 2), (1, 2)):
        sequences.admit(slot, length)
    assert sequences.preempt(3) == [1, 0] and sequences.pages.free == 2


class Life:
    """Sequences with a copy of their tokens, to check that each sequence reads from its pages the tokens that it wrote."""

    def __init__(self, seed):
        self.rng, self.sequences = random.Random(seed), Sequences(Pages(12), 3, slots=6)
        self.content, self.tokens = {}, []

    def write(self, slot, position, token):
        self.content[self.sequences.held[slot][position // 3], position % 3] = token

    def admit(self, samples):
        prompt, first = [self.rng.random() for _ in range(self.rng.randint(1, 5))], len(self.tokens)
        for slot in range(first, min(first + samples, 6)):
            self.sequences.admit(slot, len(prompt), None if slot == first else first)
            self.tokens.append(list(prompt))
            for position, token in enumerate(prompt):
                self.write(slot, position, token)

    def leave(self, slots):
        for slot in sorted(slots, reverse=True):
            last = len(self.tokens) - 1
            if slot != last:
                self.sequences.move(last, slot)
                self.tokens[slot] = self.tokens[last]
            self.tokens.pop()
            self.sequences.drop(last)

    def grow(self):
        for slot, tokens in enumerate(self.tokens):
            change = self.sequences.grow(slot)
            if change is not None and change[2] is not None:
                self.content |= {(change[1], i): self.content[change[2], i] for i in range(len(tokens) % 3)}
            tokens.append(self.rng.random())
            self.write(slot, len(tokens) - 1, tokens[-1])

    def check(self):
        held = self.sequences.held
        for slot, tokens in enumerate(self.tokens):
            assert self.sequences.lengths[slot] == len(tokens)
            assert [self.content[held[slot][t // 3], t % 3] for t in range(len(tokens))] == tokens
        assert len({page for pages in held for page in pages}) + self.sequences.pages.free == 12


def test_random_operations_keep_every_token():
    for seed in range(30):
        life = Life(seed)
        for _ in range(60):
            if life.rng.random() < 0.3 and life.sequences.pages.free >= 2:
                life.admit(samples=life.rng.randint(1, 3))
            life.leave([slot for slot, tokens in enumerate(life.tokens) if len(tokens) > 30 or life.rng.random() < 0.1])
            life.leave(life.sequences.preempt(len(life.tokens)))
            life.grow()
            life.check()
