"""Plans for several GPUs, counted by hand for a small model: bytes per rank, bytes over the links, seconds; and mistakes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from rlhf_engine.cli.app import app
from rlhf_engine.planner import MemoryPlan, ModelShape, Workload, items
from rlhf_engine.planner.cluster import RankPlan
from rlhf_engine.planner.gpus import GPUS, HOP
from rlhf_engine.planner.work import MACHINES, phase_times

SHAPE = ModelShape.of("qwen2.5-0.5b")
RUN = Workload(SHAPE, None, 512, 512, 64, 64, 4, 64, device="cuda")
WEIGHTS, GROUPS = 4 * SHAPE.parameters, SHAPE.layers + 1
TRAINED = items.trained(RUN)


def test_one_gpu_is_planned_as_without_gpus():
    plan, one = RankPlan.of(RUN, "h100", 1), MemoryPlan.of(RUN)
    assert plan.persistent == one.persistent and not plan.traffic
    assert {name: plan.peaks[name] - plan.kept for name in plan.phases} == {
        name: phase.total for name, phase in one.phases.items()
    }
    unit = 2 / (0.5 * 67e12)
    assert plan.total == pytest.approx(unit * sum(phase_times(replace(RUN, gpu="h100")).values()), rel=1e-12)


def test_bytes_per_rank_by_hand():
    """A rank keeps an eighth of policy, reference, moments and gradients, and has whole weights where they are needed."""
    plan, one = RankPlan.of(RUN, "h100", 8), MemoryPlan.of(RUN)
    for name in ("policy", "reference", "optimizer_state"):
        assert plan.persistent[name] == math.ceil(one.persistent[name] / 8)
    assert plan.persistent["context"] == one.persistent["context"]
    inside = sum(math.prod(shape[1:]) for shape in SHAPE.trunk().values() if shape[0] == SHAPE.layers)
    outside = WEIGHTS - 4 * SHAPE.layers * inside
    assert outside == 4 * (SHAPE.vocab + 1) * SHAPE.hidden
    assert plan.phases["generate"]["gathered_weights"] == WEIGHTS  # in addition to its part
    ends = plan.phases["train"].moments["backward ends"]
    assert ends["gathered_weights"] == outside + 2 * 4 * inside and ends["whole_gradients"] == outside
    assert ends["gradients"] == math.ceil(4 * TRAINED / 8)
    step = plan.phases["train"].moments["optimizer step"]
    assert "gathered_weights" not in step
    assert step["rollout"] == one.phases["train"].moments["optimizer step"]["rollout"]  # of all ranks


def test_two_ranks_keep_at_most_55_percent():
    plan, one = RankPlan.of(RUN, "h100", 2), MemoryPlan.of(RUN)
    kept = plan.persistent["policy"] + plan.persistent["optimizer_state"]
    gradients = plan.phases["train"].moments["optimizer step"]["gradients"]
    whole = one.persistent["policy"] + one.persistent["optimizer_state"] + 4 * TRAINED
    assert kept + gradients <= 0.55 * whole


def received(plan):
    return {(one.phase, one.operation, one.what): one for one in plan.traffic}


def test_bytes_over_the_links_by_hand():
    """16 GPUs with a copy per node: 4 sequences per rank and step, one micro-batch; then the sum over the two copies."""
    plan = RankPlan.of(RUN, "h100", 16, shard=8)
    found, epochs = received(plan), RUN.config.ppo.ppo_epochs
    assert plan.steps == epochs and plan.passes == epochs
    generate = found["generate", "all-gather", "weights"]
    assert (generate.count, generate.calls) == (7 / 8 * WEIGHTS, GROUPS)
    assert found["score", "all-gather", "reference"].count == 7 / 8 * WEIGHTS
    assert found["train", "all-gather", "weights"].count == epochs * 2 * 7 / 8 * WEIGHTS
    assert found["train", "reduce-scatter", "gradients"].count == epochs * 7 / 8 * 4 * TRAINED
    between = found["train", "all-reduce", "gradients"]
    assert between.count == epochs * 2 * (1 / 2) * 4 * TRAINED / 8
    assert {one.link for one in plan.traffic} == {"GPU link", "network"}
    assert (between.link, between.speed, between.ranks) == ("network", 400e9 / 8, 2)
    assert (generate.link, generate.speed, generate.ranks) == ("GPU link", 450e9, 8)
    assert generate.seconds == pytest.approx(generate.count / (0.8 * 450e9) + GROUPS * 7 * HOP, rel=1e-12)


def test_a_copy_over_several_nodes_moves_at_the_speed_of_the_network():
    found = received(RankPlan.of(RUN, "h100", 16))
    assert {(one.link, one.speed, one.ranks) for one in found.values()} == {("network", 400e9, 16)}
    found = received(RankPlan.of(RUN, "4090", 16))
    assert {one.speed for one in found.values()} == {12.5e9}


def test_adapters_are_whole_and_summed_once_per_step():
    run = replace(RUN, adapter=16)
    plan, one = RankPlan.of(run, "a100", 4), MemoryPlan.of(run)
    assert plan.persistent == one.persistent
    (only,) = plan.traffic
    assert (only.operation, only.calls) == ("all-reduce", plan.steps)
    assert only.count == plan.steps * 2 * 3 / 4 * 4 * items.trained(run)


def test_seconds_by_hand():
    """The slower of work and transfers counts in scoring and training; before sampling, the transfer is waited for."""
    plan = RankPlan.of(RUN, "l4", 8)
    found, unit = received(plan), GPUS["l4"].seconds_per_weight
    assert (plan.share.rollout_batch, plan.share.minibatch, plan.share.microbatch) == (8, 8, 4)
    work = phase_times(plan.share)
    moved = found["train", "all-gather", "weights"].seconds + found["train", "reduce-scatter", "gradients"].seconds
    assert plan.seconds["train"] == max(unit * work["train"], moved)
    assert plan.seconds["score"] == max(unit * work["score"], found["score", "all-gather", "reference"].seconds)
    assert plan.seconds["generate"] == pytest.approx(
        unit * work["generate"] + found["generate", "all-gather", "weights"].seconds, rel=1e-12
    )
    assert plan.seconds["optimizer"] == pytest.approx(unit * work["optimizer"] / 8, rel=1e-12)


def test_a_minibatch_that_the_ranks_do_not_divide_takes_the_time_of_its_largest_part():
    nine, eight = RankPlan.of(replace(RUN, minibatch=9), "h100", 8), RankPlan.of(replace(RUN, minibatch=16), "h100", 8)
    assert nine.share.minibatch == eight.share.minibatch == 2
    assert nine.seconds["train"] / nine.steps == pytest.approx(eight.seconds["train"] / eight.steps, rel=1e-12)


def test_costs_of_a_gpu_by_hand():
    """Of the speeds of an L4: half for products, 80 percent for its memory and for PCIe."""
    token = 2 / (0.5 * 30.3e12)
    machine = MACHINES["l4"]
    assert machine.read == pytest.approx(4 / (0.8 * 0.3e12) / token, rel=1e-12)
    assert machine.from_host == pytest.approx(4 / (0.8 * 32e9) / token, rel=1e-12)
    assert machine.optimizer["resident"] == pytest.approx(7 * machine.read, rel=1e-12)
    assert machine.half == pytest.approx(30.3 / 121, rel=1e-12)
    # A decode step of 64 rows takes the time of reading the weights.
    layers, head = SHAPE.layer_matrices, SHAPE.vocab * SHAPE.hidden
    generate = 64 * 512 * layers + 512 * machine.read * (layers + head)
    assert phase_times(replace(RUN, gpu="l4"))["generate"] == pytest.approx(generate, rel=1e-12) and machine.read > 64


def test_keys_and_values_take_what_is_left():
    plan = RankPlan.of(replace(RUN, rollout_batch=2048, slots=1024), "l4", 2)
    assert plan.smallest_pool <= plan.kv_bytes < plan.phases["generate"]["kv_cache"]
    assert plan.peaks["generate"] == GPUS["l4"].memory


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({}, ("b200", 8), "--gpu: got 'b200', expected one of a100, h100, h200, l4, 4090"),
        ({}, ("h100", 0), "--gpus: got 0, expected at least 1"),
        ({}, ("h100", 8, 3), "--shard: got 3 for 8 GPUs, expected a number that divides 8"),
        ({"adapter": 16}, ("h100", 8, 8), "with adapters or top layers every rank has all weights; leave --shard and"),
        ({}, ("h100", 128), "ppo.rollout_batch: got 64 for 128 GPUs, expected at least one sequence per GPU"),
    ],
)
def test_mistakes(changes, arguments, words):
    with pytest.raises(ValueError) as error:
        RankPlan.of(replace(RUN, **changes), *arguments)
    assert words in str(error.value)


def test_the_command_prints_and_writes_the_plan(tmp_path):
    command = ["plan", "--model", "qwen2.5-0.5b", "--gpus", "2", "--gpu", "a100", "--output", str(tmp_path / "out")]
    printed = CliRunner().invoke(app, command).output
    assert printed.startswith("2 x a100, 8 per node, 1 copy, sharded over 2; predicted from data sheets, not measured")
    assert "over GPU link of 2 ranks" in printed and "seconds of an update: " in printed
    numbers = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert numbers["shard"] == 2 and len(numbers["traffic"]) == 4
    assert (tmp_path / "out" / "plan.png").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "distributed.shard=4"], "2 copies, sharded over 4"),
        (["--set", "distributed.replicate=4"], "4 copies, sharded over 2"),
        (["--set", "distributed.shard=4", "--shard", "8"], "1 copy, sharded over 8"),
    ],
)
def test_shards_are_by_default_those_of_the_config(options, words):
    command = ["plan", "--model", "qwen2.5-0.5b", "--gpus", "8", *options]
    assert CliRunner().invoke(app, command).output.startswith(f"8 x h100, 8 per node, {words}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard", "2"], "--shard is set, but --gpus is not; give the number of GPUs"),
        (["--gpus", "8", "--set", "distributed.shard=3"], "distributed: got shard 3 and replicate None for 8 ranks"),
        (["--gpus", "2", "--gpu-memory", "24GB"], "--gpu-memory and --gpus are both set; name a GPU with --gpu"),
    ],
)
def test_options_that_exclude_each_other(options, words):
    result = CliRunner().invoke(app, ["plan", "--model", "qwen2.5-0.5b", *options])
    assert isinstance(result.exception, ValueError) and words in str(result.exception)
