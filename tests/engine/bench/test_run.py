"""The suites `kernels` and `loss`: records, the gate, skipped shapes and interruptions."""

import json

import pytest
import torch

from rlhf_engine.bench import cases, kernels, run, suites
from rlhf_engine.bench.loss import linear_loss_case
from rlhf_engine.bench.report import markdown
from rlhf_engine.bench.run import GateError, Run
from rlhf_engine.bench.shapes import Shape
from rlhf_engine.planner import ModelShape
from rlhf_engine.planner.presets import PRESETS


def stored(folder):
    return json.loads((folder / "bench.json").read_text())


@pytest.fixture(scope="module")
def silent():
    return lambda line: None


def test_every_op_is_measured_checked_and_on_disk(tmp_path, settings, silent):
    Run(settings("kernels", "loss"), tmp_path, silent).run(suites.SUITES)
    record = stored(tmp_path)
    found = {case["name"]: case for suite in record["suites"].values() for case in suite["cases"]}
    assert len(found) == 16 and record["finished"] and record["limits"]["product"]
    for case in found.values():
        assert case["gate"]["passed"] and case["gate"]["error"] <= case["gate"]["bound"]
        assert case["backend"] == "cpu" and len(case["samples"]) == 2
        assert case["seconds"]["least"] > 0 and case["eager_seconds"]["count"] == 2
        assert case["limit_seconds"] > 0 and case["peak_bytes"] >= 0 and case["bytes"] > 0
    loss = found["linear_ppo_loss, forward+backward"]
    assert loss["flops"] == 6 * 16 * 40 * 16 and loss["bytes"] == 2 * 4 * 16 * (16 + 40)
    assert found["gae"]["bytes"] == 17 * 4 * 8
    text = (tmp_path / "bench.md").read_text()
    assert "| linear_ppo_loss, forward+backward | N=16 H=16 V=40 | cpu |" in text and text == markdown(record)


def test_a_wrong_result_stops_the_report_and_names_the_case(tmp_path, settings, silent, monkeypatch):
    right = kernels.gae

    def wrong(*tensors, backend):
        advantages, returns = right(*tensors, backend=backend)
        return (advantages + 1e-3, returns) if backend == "auto" else (advantages, returns)

    monkeypatch.setattr(kernels, "gae", wrong)
    with pytest.raises(
        GateError, match=r"gae, B=4 T=8, backend cpu: the error against float64 is 1\.0..e-03, expected at most"
    ):
        Run(settings("kernels", "loss"), tmp_path, silent).run(suites.SUITES)
    record = stored(tmp_path)
    assert record["suites"]["kernels"]["state"] == "stopped" and "loss" not in record["suites"]
    assert "**Stopped: gae, B=4 T=8" in (tmp_path / "bench.md").read_text()


def test_nan_fails_the_gate():
    nan, zero = torch.tensor([float("nan")]), torch.zeros(1)
    assert not cases._compared(nan, zero, zero).passed


def test_a_shape_that_does_not_fit_is_skipped_with_its_need(tmp_path, settings, silent, monkeypatch):
    shape = Shape.of(ModelShape.from_fields(PRESETS["llama-3.1-8b"]), 2**20)
    need = linear_loss_case(shape, torch.float32, value=False).need
    assert need > 20 * 2**20 * 128256  # logits, their log-softmax and gradient, in eager PyTorch
    monkeypatch.setattr(run, "available_bytes", lambda device: 20_000)
    Run(settings("loss"), tmp_path, silent).run(suites.SUITES)
    first, *_, last = stored(tmp_path)["suites"]["loss"]["cases"]
    assert first["skipped"] == "needs 23552 bytes of memory, 20000 bytes are free" and "samples" not in first
    assert "samples" in last
    assert "skipped, needs 23552 bytes of memory" in (tmp_path / "bench.md").read_text()


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, settings, silent, monkeypatch):
    rounds = run.rounds_of

    def interrupted(*args, **more):
        yield next(rounds(*args, **more))
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "rounds_of", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"what was measured so far is in .*bench\.json"):
        Run(settings("loss"), tmp_path, silent).run(suites.SUITES)
    record = stored(tmp_path)
    assert record["finished"] is None and record["suites"]["loss"]["state"] == "interrupted"
    assert all(len(case["samples"]) == 1 for case in record["suites"]["loss"]["cases"])
    assert "not finished" in (tmp_path / "bench.md").read_text()


def test_shapes_have_several_sequences():
    model = ModelShape.from_fields(PRESETS["qwen2.5-7b"])
    shape = Shape.of(model, 8192)
    assert (shape.sequences, shape.positions, shape.hidden, shape.vocab, shape.groups) == (16, 512, 3584, 152064, 4)
    shape = Shape.of(model, 7, hidden=8, vocab=9)
    assert (shape.sequences, shape.positions, shape.hidden, shape.vocab) == (7, 1, 8, 9)
