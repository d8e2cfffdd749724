"""A run of the suites at tiny shapes, whose figures have no meaning."""

import pytest
import torch

from rlhf_engine.bench import timing
from rlhf_engine.bench.run import EFFORTS, Effort, Settings


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Replace the sizes of the limits and of every effort by tiny ones."""
    monkeypatch.setattr(timing.LimitCalls, "SIZES", {"cpu": (2**10, 8)})
    for name in EFFORTS:
        monkeypatch.setitem(EFFORTS, name, Effort(name, 2, 0.0, 16, (4, 8)))


@pytest.fixture
def settings():
    """Return a function that makes settings of tiny cases."""

    def make(*suites, **more):
        sizes = {"model": "llama-7m", "hidden": 16, "vocab": 40} | more
        return Settings(suites, torch.device("cpu"), torch.float32, EFFORTS["quick"], **sizes)

    return make
