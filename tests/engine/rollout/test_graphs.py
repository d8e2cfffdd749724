"""`GraphedStep` with a stand-in for torch.cuda: what is captured and when, and replays on the memory of the capture."""

from contextlib import contextmanager

import pytest
import torch

from rlhf_engine.rollout.decode.gpu import WARM_UP, GraphedStep, ladder
from tests.engine.helpers.recorded_graphs import RecordedCuda


@pytest.fixture
def cuda(monkeypatch):
    return RecordedCuda.installed(monkeypatch)


def make():
    x, calls = torch.arange(8.0), []

    def function(size):
        calls.append(size)
        x[:size] *= 2

    return GraphedStep(function), x, calls


@contextmanager
def kept(x):
    before = x.clone()
    yield
    x.copy_(before)


def test_a_size_is_captured_once_and_replayed(cuda):
    step, x, calls = make()
    for times in (1, 2):
        step("key", 4, lambda: kept(x))
        assert x.tolist() == [2**times * n if n < 4 else n for n in range(8)]
    assert calls == [4] * (WARM_UP + 1) and [graph.replays for graph in cuda.graphs] == [2]
    x.fill_(1.0)  # in place: the graph reads the same address
    step("key", 2, lambda: kept(x))
    assert x.tolist() == [2.0, 2.0] + [1.0] * 6
    assert [graph.replays for graph in cuda.graphs] == [2, 1] and cuda.pools == [None, cuda.graphs[0].pool()]


def test_a_new_key_captures_again(cuda):
    step, x, calls = make()
    for key, size in ((1, 4), (1, 2), (2, 4), (2, 4)):
        step(key, size, lambda: kept(x))
    assert [graph.replays for graph in cuda.graphs] == [1, 1, 2] and len(calls) == 3 * (WARM_UP + 1)
    assert cuda.pools[2] is None and x[:4].tolist() == [0.0, 16.0, 16.0, 24.0]


def test_a_function_that_waits_is_not_captured(cuda):
    x = torch.ones(2)
    step = GraphedStep(lambda size: x.mul_(float(x.sum())))
    with pytest.raises(RuntimeError, match="waits for the device"):
        step("key", 2)


def test_no_cuda_device_is_refused(monkeypatch):
    RecordedCuda.installed(monkeypatch, available=False)
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device"):
        GraphedStep(lambda size: None)


def test_ladder():
    assert [ladder(n) for n in (1, 2, 3, 8, 9, 64, 65)] == [1, 2, 4, 8, 16, 64, 128]
    assert ladder(3, 16) == 16 and ladder(17, 16) == 32
