"""`GraphedStep` on a stand-in for torch.cuda: what is captured, when, and that a replay reads the static inputs."""

import pytest
import torch

from rlhf_engine.rollout.graphs import WARM_UP, GraphedStep, ladder
from tests.engine.recorded_graphs import RecordedCuda


def make():
    cuda, weight, calls = RecordedCuda(), torch.tensor([2.0]), []

    def function(x, y):
        calls.append(len(x))
        return x * weight + y, x.sum()

    return GraphedStep(function, cuda), cuda, weight, calls


def test_a_shape_is_captured_once_and_replayed():
    step, cuda, weight, calls = make()
    for value in (1.0, 5.0):
        out, total = step("key", torch.full((4,), value), torch.ones(4))
        assert out.tolist() == [2 * value + 1] * 4 and total.item() == 4 * value
    assert calls == [4] * (WARM_UP + 1) and [graph.replays for graph in cuda.graphs] == [2]
    weight.fill_(3.0)  # in place: the graph reads it where it lies
    assert step("key", torch.ones(4), torch.ones(4))[0].tolist() == [4.0] * 4
    assert step("key", torch.ones(2), torch.ones(2))[0].tolist() == [4.0] * 2
    assert [graph.replays for graph in cuda.graphs] == [3, 1]
    assert cuda.pools == [None, cuda.graphs[0].pool()]


def test_inputs_are_not_kept():
    """The caller's tensors may go, and its own are not written."""
    step, *_ = make()
    x = torch.ones(3)
    step("key", x, torch.zeros(3))
    x.fill_(9.0)
    assert step("key", torch.full((3,), 2.0), torch.zeros(3))[0].tolist() == [4.0] * 3 and x.tolist() == [9.0] * 3


def test_another_key_captures_again():
    step, cuda, _, calls = make()
    step(1, torch.ones(4), torch.ones(4))
    step(1, torch.ones(2), torch.ones(2))
    step(2, torch.ones(4), torch.ones(4))
    step(2, torch.ones(4), torch.ones(4))
    assert [graph.replays for graph in cuda.graphs] == [1, 1, 2] and len(calls) == 3 * (WARM_UP + 1)
    assert cuda.pools[2] is None


def test_a_function_that_waits_is_not_captured():
    step = GraphedStep(lambda x: (x * float(x.sum()),), RecordedCuda())
    with pytest.raises(RuntimeError, match="waits for the device"):
        step("key", torch.ones(2))


def test_no_device():
    with pytest.raises(ValueError, match="graphs: got a machine without a CUDA device"):
        GraphedStep(lambda x: (x,), RecordedCuda(available=False))


def test_ladder():
    assert [ladder(n) for n in (1, 2, 3, 8, 9, 64, 65)] == [1, 2, 4, 8, 16, 64, 128]
    assert ladder(3, 16) == 16 and ladder(17, 16) == 32
