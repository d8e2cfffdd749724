"""Schedules of faults from a few dozen seeds; `make soak` runs thousands."""

import logging

import pytest

from tests.engine.faults.simulate import simulator

SEEDS = 24
PARTS = 3


@pytest.fixture(scope="module")
def runs():
    logging.disable(logging.WARNING)
    with simulator() as found:
        yield found
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_run_ends_as_the_undisturbed_one(runs, part):
    """A failure's message has the schedule; `python -m tests.engine.faults SEED` replays it."""
    for seed in range(part * SEEDS // PARTS, (part + 1) * SEEDS // PARTS):
        lines = []
        try:
            runs.run(seed, lines.append)
        except AssertionError as error:
            raise AssertionError("\n".join((f"seed {seed}", *lines))) from error


def test_schedules_are_functions_of_the_seed(runs):
    first, second = [], []
    runs.run(3, first.append)
    runs.run(3, second.append)
    assert first == second
