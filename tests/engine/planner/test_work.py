"""The estimate of an update's time: counted by hand for a small model, and its order for changed settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_engine.config import PPOConfig, RunConfig
from rlhf_engine.planner import ModelShape, Workload
from rlhf_engine.planner.strategies import _tried
from rlhf_engine.planner.work import LOW_RANK, MACHINES, update_time

SHAPE = ModelShape.of("qwen2.5-0.5b")
RUN = Workload(SHAPE, SHAPE, 512, 512, 64, 64, 4, 64, device="cuda")
LAYERS, HEAD, CUDA = SHAPE.layer_matrices, SHAPE.vocab * SHAPE.hidden, MACHINES["cuda"]
TOKENS, ACTIONS = 64 * 1024, 64 * 512


def test_full_fine_tuning_by_hand():
    """Prompts and decode steps; reference and reward model; forward pass and two products per matrix; the optimizer."""
    generate = 64 * 512 * LAYERS + 512 * 64 * (LAYERS + HEAD)
    score = 2 * TOKENS * LAYERS + ACTIONS * HEAD
    train = 3 * TOKENS * LAYERS + 3 * ACTIONS * HEAD
    trained = SHAPE.parameters + SHAPE.hidden + 1
    expected = generate + score + train + trained * CUDA.optimizer["resident"]
    assert update_time(RUN) == pytest.approx(expected, rel=1e-12)


def test_every_epoch_trains_once_more():
    two, three = (update_time(replace(RUN, config=RunConfig(ppo=PPOConfig(ppo_epochs=epochs)))) for epochs in (2, 3))
    once = update_time(RUN)
    assert three - two == pytest.approx(two - once, rel=1e-9) and two > once


def test_adapters_by_hand():
    """One product per matrix less in the backward pass, the head without its gradient, and the adapter in every pass."""
    run = replace(RUN, adapter=16, reward_adapter=True)
    trunk = SHAPE.trunk()
    inside = [shape for shape in trunk.values() if len(shape) == 3]
    adapter = LOW_RANK * sum(layers * 16 * (rows + columns) for layers, rows, columns in inside)
    generate = 64 * 512 * (LAYERS + adapter) + 512 * 64 * (LAYERS + adapter + HEAD)
    score = 2 * TOKENS * LAYERS + TOKENS * adapter + ACTIONS * HEAD
    train = 2 * TOKENS * LAYERS + 2 * ACTIONS * HEAD + 3 * TOKENS * adapter
    trained = adapter / LOW_RANK + SHAPE.hidden + 1
    assert update_time(run) == pytest.approx(generate + score + train + trained * CUDA.optimizer["resident"], rel=1e-12)


@pytest.mark.parametrize(
    ("faster", "slower"),
    [
        ({}, {"gradient_checkpointing": True}),
        ({"adapter": 16}, {}),
        ({"adapter": 16, "merge_adapters": "always"}, {"adapter": 16}),
        ({"adapter": 16}, {"adapter": 16, "quant": "nf4"}),
        ({"train_layers": 6}, {}),
        ({"train_layers": 6}, {"train_layers": 6, "reference": "frozen_copy"}),
        ({"dtype": "bfloat16"}, {}),
        ({}, {"optimizer_state": "host"}),
        ({}, {"slots": 8, "device": "cpu", "quant": "none", "adapter": 0, "value": "backbone"}),
        ({"reward": None}, {}),
    ],
)
def test_order(faster, slower):
    assert update_time(replace(RUN, **faster)) < update_time(replace(RUN, **slower))


def test_few_rows_read_the_weights():
    """A decode step with one row takes the time of reading every weight."""
    one, two = (update_time(replace(RUN, slots=slots)) for slots in (1, 2))
    assert one > two and CUDA.read > 2


def test_tried_strategies_include_top_layers_and_drop_a_copied_reference():
    tried = [one.plan.workload for one in _tried(replace(RUN, adapter=0, budget=2**34))]
    assert {one.train_layers for one in tried} == {None, SHAPE.layers // 4}
    assert not any(one.adapter and one.train_layers for one in tried)
    config = RunConfig(ppo=PPOConfig(reference="frozen_copy"))
    tried = [one.plan.workload for one in _tried(replace(RUN, reference="frozen_copy", config=config, budget=2**34))]
    assert {one.reference for one in tried} == {"frozen_copy", "auto"}
