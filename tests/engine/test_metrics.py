"""Metric sums, the files they are written to, and the learning-rate schedule."""

import json
import math
import time
from itertools import pairwise

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from rlhf_engine.config import OptimConfig
from rlhf_engine.memory.arena import peak_rss_mb, resident_mb
from rlhf_engine.metrics import MetricsWriter, read_metrics
from rlhf_engine.optim.adamw import Schedule, learning_rate, optimizer_step
from rlhf_engine.optim.build import build_optimizer
from rlhf_engine.ppo.minibatch import MetricSum


def test_sums_add_and_maxima_are_kept():
    sums = MetricSum()
    sums.add({"loss": torch.tensor(1.0), "ratio_max": torch.tensor(3.0)})
    sums.add({"loss": torch.tensor(2.0), "ratio_max": torch.tensor(2.0)})
    assert {name: float(value) for name, value in sums.total().items()} == {"loss": 3.0, "ratio_max": 3.0}
    assert sums.mean() == {"loss": 1.5, "ratio_max": 3.0}


def test_explained_variance_comes_from_the_sums():
    # returns 1, 3 and residuals 1, -1 in one part, returns 5, 7 and residuals 1, -1 in the other:
    # Var(returns) = 21 - 16 = 5 and Var(residuals) = 1, so 1 - 1 / 5.
    sums = MetricSum()
    for returns, squares in ((4.0, 10.0), (12.0, 74.0)):
        parts = {"returns_sum": returns, "returns_sq_sum": squares, "residual_sum": 0.0, "residual_sq_sum": 2.0}
        sums.add({name: torch.tensor(value) for name, value in {**parts, "num_value_tokens": 2.0}.items()})
    assert sums.mean() == pytest.approx({"explained_variance": 0.8})


def test_writer_fills_both_files(tmp_path):
    with MetricsWriter(tmp_path, "ppo") as writer:
        writer.write(1, {"kl": 0.5, "broken": math.nan})
        writer.write(2, {"kl": 0.25})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"stage": "ppo", "step": 1, "kl": 0.5, "broken": None},
        {"stage": "ppo", "step": 2, "kl": 0.25},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("ppo/kl")] == [(1, 0.5), (2, 0.25)]


def test_a_resumed_run_does_not_repeat_lines(tmp_path):
    with MetricsWriter(tmp_path, "sft") as writer:
        writer.write(3, {"loss": 1.0})
    with MetricsWriter(tmp_path, "ppo") as writer:
        for step in (1, 2, 3):
            writer.write(step, {"kl": float(step)})
    with MetricsWriter(tmp_path, "ppo", resume_after=1) as writer:
        writer.write(2, {"kl": 20.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(x["stage"], x["step"], x.get("kl")) for x in lines] == [
        ("sft", 3, None),
        ("ppo", 1, 1.0),
        ("ppo", 2, 20.0),
    ]


def test_a_run_that_fails_before_its_first_line_removes_none(tmp_path):
    with MetricsWriter(tmp_path, "sft", resume_after=0) as writer:
        writer.write(1, {"loss": 1.0})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt), MetricsWriter(tmp_path, "sft", resume_after=0):
        raise KeyboardInterrupt
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with MetricsWriter(tmp_path, "sft", resume_after=0) as writer:
        assert len(read_metrics(tmp_path)) == 1
        writer.write(1, {"loss": 2.0})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [2.0]
    with MetricsWriter(tmp_path / "none", "sft", resume_after=0):
        pass
    assert read_metrics(tmp_path / "none") == [] and not (tmp_path / "none").exists()


def steps_on_the_board(folder, tag):
    boards = EventMultiplexer().AddRunsFromDirectory(str(folder / "tensorboard")).Reload()
    return [
        event.step
        for run, found in boards.Runs().items()
        if tag in found["scalars"]
        for event in boards.Scalars(run, tag)
    ]


def test_a_stage_hides_no_curve_of_a_different_stage(tmp_path):
    with MetricsWriter(tmp_path, "sft", resume_after=0) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0 / step})
    time.sleep(1.1)  # event files are read in the order of their names, which contain the time in seconds
    with MetricsWriter(tmp_path, "rm", resume_after=0) as writer:
        writer.write(1, {"loss": 1.0})
    assert steps_on_the_board(tmp_path, "sft/loss") == [1, 2, 3, 4, 5]
    time.sleep(1.1)
    with MetricsWriter(tmp_path, "sft", resume_after=3) as writer:
        writer.write(4, {"loss": 0.0})
    assert steps_on_the_board(tmp_path, "sft/loss") == [1, 2, 3, 4]
    assert steps_on_the_board(tmp_path, "rm/loss") == [1]


@pytest.mark.parametrize("resume_after", [None, 1, 2])
def test_an_incomplete_last_line_is_dropped(tmp_path, resume_after):
    with MetricsWriter(tmp_path, "ppo") as writer:
        writer.write(1, {"kl": 0.1})
        writer.write(2, {"kl": 0.2})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    with MetricsWriter(tmp_path, "ppo", resume_after=resume_after) as writer:
        writer.write(2, {"kl": 20.0})
    assert [(row["step"], row["kl"]) for row in read_metrics(tmp_path)] == [(1, 0.1), (2, 20.0)]
    assert [found.name for found in tmp_path.iterdir() if found.is_file()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["{", "3", '{"stage": "ppo"}'])
def test_any_other_broken_line_is_named_and_kept(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"stage": "ppo", "step": 1}}\n{line}\n{{"stage": "ppo", "step": 2}}\n')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        MetricsWriter(tmp_path, "ppo", resume_after=1)
    assert path.read_bytes() == before


def test_lines_after_a_damaged_one_are_restored_from_the_checkpoint(tmp_path):
    """After a power cut, a line may have zeros in its middle."""
    with MetricsWriter(tmp_path, "sft") as writer:
        writer.write(1, {"loss": 1.0})
    with MetricsWriter(tmp_path, "ppo") as writer:
        for step in (1, 2, 3):
            writer.write(step, {"kl": float(step)})
        history, path = tmp_path / "checkpoint", tmp_path / "metrics.jsonl"
        history.mkdir()
        (history / "metrics.jsonl").write_bytes(writer.lines())
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:8] + bytes(9) + lines[2][17:]
    path.write_bytes(b"".join(lines))
    with MetricsWriter(tmp_path, "ppo", resume_after=3, history=history) as writer:
        writer.write(4, {"kl": 4.0})
    rows = [(row["stage"], row["step"]) for row in read_metrics(tmp_path)]
    assert rows == [("sft", 1), ("ppo", 1), ("ppo", 2), ("ppo", 3), ("ppo", 4)]


def test_peak_memory_grows_with_an_allocation():
    before = peak_rss_mb()
    # The block first fills the memory that other tests freed. Without a report of resident memory, assume the whole peak.
    freed = before - resident_mb() or before
    block = torch.ones(int((freed + 200) * 1e6) // 4)
    assert peak_rss_mb() > before + 100, len(block)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]),
        (
            "cosine",
            [0.25, 0.5, 0.75, 1.0, 0.2 + 0.8 * 0.5 * (1 + 0.5**0.5), 0.6, 0.2 + 0.8 * 0.5 * (1 - 0.5**0.5), 0.2],
        ),
    ],
)
def test_learning_rate(schedule, expected):
    config = OptimConfig(lr=1.0, warmup_steps=3, schedule=schedule, final_lr_share=0.2)
    assert [learning_rate(config, step, 8) for step in range(8)] == pytest.approx(expected)


def rates_of(schedule, *lengths, lr=1.0, **settings):
    """Return the rates of a run of the first length that is resumed at each (step, length)."""
    (_, total), *changes = lengths
    plan = Schedule(OptimConfig(lr=lr, schedule=schedule, final_lr_share=0.2, **settings), total)
    rates = []
    for step in range(lengths[-1][1]):
        for first, new in changes:
            if first == step:
                plan.replan(first, new)
        rates.append(plan.rate(step))
    return rates


def test_a_longer_run_goes_on_without_a_jump():
    """Four of five steps are done at the line 1, 0.8, 0.6, 0.4, 0.2; the rest falls from 0.2 to 0.2, or from 0.4."""
    assert rates_of("linear", (0, 5), (3, 8)) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.35, 0.3, 0.25, 0.2])
    assert rates_of("linear", (0, 5), (5, 8)) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2])
    longer = rates_of("cosine", (0, 5), (3, 8))
    assert longer[:4] == rates_of("cosine", (0, 5))[:4] and longer[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(longer))


def test_a_shorter_run_falls_faster_and_a_run_may_change_twice():
    assert rates_of("linear", (0, 9), (4, 7)) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.4, 0.2])
    twice = rates_of("linear", (0, 5), (3, 8), (4, 6))
    assert twice == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.35, 0.2])


def test_a_change_during_the_warm_up_or_of_a_constant_rate_gives_the_rates_of_the_new_length():
    warm = {"warmup_steps": 3}
    assert rates_of("linear", (0, 5), (2, 8), **warm) == rates_of("linear", (0, 8), **warm)
    assert rates_of("constant", (0, 5), (4, 8)) == [1.0] * 8


def make_layer():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def test_only_matrices_are_decayed():
    layer = make_layer()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    optimizer = build_optimizer(layer, config)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_step(optimizer, config, 0, 1)
    torch.testing.assert_close(layer.weight.detach(), weight * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias.detach(), bias)


def test_gradients_are_clipped_to_the_norm_and_cleared():
    layer = make_layer()
    config = OptimConfig(lr=1e-3, max_grad_norm=0.5)
    optimizer = build_optimizer(layer, config)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in layer.parameters()]))
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), 2.0)
    norm, rate = optimizer_step(optimizer, config, 0, 1)
    assert float(norm) == pytest.approx(2 * 8**0.5)
    assert rate == 1e-3
    assert float(torch.cat([g.flatten() for g in seen[0]]).norm()) == pytest.approx(0.5, rel=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize("limit", [1.0, None])
def test_a_gradient_that_is_not_finite_changes_no_weight(limit):
    layer = make_layer()
    before = layer.weight.detach().clone()
    config = OptimConfig(max_grad_norm=limit)
    optimizer = build_optimizer(layer, config)
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), torch.inf), torch.zeros(2)
    with pytest.raises(FloatingPointError, match=r"norm of (inf|nan) at optimizer step 1"):
        optimizer_step(optimizer, config, 0, 1)
    assert torch.equal(layer.weight.detach(), before)


class Disk:
    """A file on a disk with room for `free` more bytes."""

    def __init__(self, file, free):
        self.file, self.free = file, free

    def write(self, data):
        if self.free == 0:
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.free])
        self.free -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("free", [0, 1, 30])
def test_a_line_refused_by_a_full_disk_is_written_later_as_a_whole(tmp_path, free):
    with MetricsWriter(tmp_path, "ppo") as writer:
        writer.write(1, {"kl": 0.1})
        writer.log.file = Disk(writer.log.file, free)
        with pytest.raises(OSError, match="No space"):
            writer.write(2, {"kl": 0.2})
        assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
        with pytest.raises(OSError, match="No space"):
            writer.write(3, {"kl": 0.3})
        with pytest.raises(OSError, match="No space"):
            writer.sync()
        assert [row["step"] for row in read_metrics(tmp_path)] == [1]
        writer.log.file.free = 1000
        writer.sync()
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
        writer.write(4, {"kl": 0.4})
    rows = [(row["step"], row["kl"]) for row in read_metrics(tmp_path)]
    assert rows == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
