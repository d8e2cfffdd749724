"""The throughput card: the prediction by hand, and a measurement of a tiny model on the CPU."""

import json

import pytest
import torch

from rlhf_engine.bench import card
from rlhf_engine.planner.work import MACHINES, model_flops, phase_times, update_time
from tests.engine.helpers.cli_run import rlhf


def test_the_prediction_without_the_device(capsys, tmp_path):
    code, out, err = rlhf(
        capsys, "bench", "card", "--model", "qwen2.5-0.5b", "--gpu-memory", "80GiB", "--output", tmp_path / "card"
    )
    assert code == 0, err
    found = json.loads((tmp_path / "card/card.json").read_text())
    part = found["predicted"]
    assert found["measured"] is None and "does not have the device" in found["note"]
    assert part["seconds"] == pytest.approx(sum(phase["seconds"] for phase in part["phases"].values()))
    assert 0 < part["mfu"] < 1 and part["peak_bytes"] <= 0.95 * 80 * 2**30 and part["largest_batch"] > 0
    assert "response tokens/s, MFU" in out
    assert (tmp_path / "card/card.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_are_counted_work_at_the_rate_of_the_device():
    plan = card.strategy_for(card.fields_of("qwen2.5-0.5b"), "h100", 80 * 2**30, ()).plan
    w, part = plan.workload, card.predicted(plan)
    assert update_time(w) == sum(phase_times(w).values())
    assert part["seconds"] == pytest.approx(update_time(w) * MACHINES["h100"].weight_seconds)
    assert part["mfu"] == pytest.approx(model_flops(w) / part["seconds"] / 989e12)
    tokens, actions = w.rollout_batch * w.length, w.rollout_batch * w.response
    layers, head, epochs = w.policy.layer_matrices, w.policy.vocab * w.policy.hidden, w.config.ppo.ppo_epochs
    # Sampling, reference, reward model, and three products per epoch.
    assert model_flops(w) == 2 * (tokens * layers * (3 + 3 * epochs) + actions * head * (2 + 3 * epochs))


def test_a_small_model_is_measured_on_the_cpu(tmp_path):
    sizes = [f"ppo.{name}=4" for name in ("rollout_batch", "minibatch", "microbatch")]
    sizes += [f"rollout.{name}=4" for name in ("max_prompt_tokens", "max_response_tokens")]
    lines = []
    found = card.make_card("llama-7m", torch.device("cpu"), None, 10**9, sizes, tmp_path, lines.append)
    part = found["measured"]
    assert len(lines) == card.UPDATES and part["largest_batch"] is None
    assert part["tokens_per_second"] == pytest.approx(16 / part["seconds"])
    assert part["phases"].keys() == found["predicted"]["phases"].keys()


def test_the_largest_batch_is_searched_from_the_planned_one(monkeypatch):
    tried = []

    class Trainer:
        def __init__(self, settings):
            self.rows = settings["ppo"]["microbatch"]

        def step(self):
            tried.append(self.rows)
            if self.rows > 23:
                raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(card, "make_trainer", lambda fields, settings: Trainer(settings))
    assert card.largest_batch({}, {"ppo": {}}, 20) == 22 and tried == [20, 22, 24]
    assert card.largest_batch({}, {"ppo": {}}, 30) == 23 and tried[3:] == [30, 27, 25, 23]
    monkeypatch.setattr(Trainer, "step", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert card.largest_batch({}, {"ppo": {}}, 3) == 0


def test_a_gpu_is_known_by_its_name():
    assert card.known_gpu("NVIDIA H200") == "h200" and card.known_gpu("NVIDIA A100-SXM4-80GB") == "a100"
    assert card.known_gpu("NVIDIA GeForce RTX 4090") == "4090" and card.known_gpu("NVIDIA L40S") == ""


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--model", "gpt-2"], "unknown model 'gpt-2': did you mean 'gpt2'?"),
        (
            ["--model", "qwen2.5-72b", "--gpu-memory", "24GiB"],
            "no settings that were tried fit 24.00 GiB; the smallest",
        ),
        (["--model", "gpt2", "--gpu", "h20"], "unknown GPU 'h20': did you mean 'h200'? expected one of a100"),
        (["--model", "gpt2", "--gpu-memory", "24"], "--gpu-memory: got '24'"),
    ],
)
def test_mistakes(capsys, tmp_path, arguments, expected):
    code, _, err = rlhf(capsys, "bench", "card", *arguments, "--output", tmp_path / "card")
    assert code == 2 and err.count("\n") == 1 and expected in err and not (tmp_path / "card").exists()
