"""A run of the suites at tiny shapes, whose figures have no meaning."""

import pytest
import torch

from rlhf_engine.bench import scaling, shapes, timing
from rlhf_engine.bench.run import EFFORTS, Batch, Effort, Settings


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Replace the sizes of the limits and of every effort by tiny ones."""
    monkeypatch.setattr(timing.LimitCalls, "SIZES", {"cpu": (2**10, 8)})
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny = shapes.SMALL["llama-7m"] | sizes | {"num_key_value_heads": 2, "vocab_size": 40}
    monkeypatch.setitem(shapes.MODELS, "llama-7m", tiny)
    monkeypatch.setitem(shapes.SMALL, "llama-7m", tiny)
    monkeypatch.setattr(scaling, "WIDTHS", (8, 16, 32))
    for name in EFFORTS:
        monkeypatch.setitem(EFFORTS, name, Effort(name, 2, 0.0, 16, (4, 8), Batch(4, 4, 4, 1, 2), 2))


@pytest.fixture
def settings():
    """Return a function that makes settings of tiny cases."""

    def make(*suites, **more):
        sizes = {"model": "llama-7m", "hidden": 16, "vocab": 40} | more
        return Settings(suites, torch.device("cpu"), torch.float32, EFFORTS["quick"], **sizes)

    return make
