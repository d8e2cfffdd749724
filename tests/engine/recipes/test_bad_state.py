"""A PPO run that ends with an unforeseen exception, or whose weights are not finite: what is saved."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rlhf_engine.config import load_config
from rlhf_engine.ppo.callbacks import Callback
from rlhf_engine.recipes import run_ppo
from tests.engine.helpers.cli_run import new_run, read_lines

SETS = ("reward.function=rewards.py:reward", "ppo.value_init=zero", "ppo.updates=3", "ppo.score_scale=running")


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def reward(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    return new_run(tmp_path, base)


class After(Callback):
    """Calls a function with the trainer after update number `update`."""

    def __init__(self, update, function):
        self.update, self.function = update, function

    def on_update(self, trainer, log):
        if trainer.updates_done == self.update:
            self.function(trainer)


def start(*sets, resume=False, callbacks=()):
    return run_ppo(load_config("run.yaml", [*SETS, *sets]), resume=resume, callbacks=callbacks)


def updates(out):
    return json.loads((out / "ppo" / "trainer.json").read_text())["updates_done"]


def same_end(first, second):
    weights = [load_file(out / "ppo" / "model.safetensors") for out in (first, second)]
    scores = [
        [(row["step"], row["score_mean"]) for row in read_lines(out / "metrics.jsonl")] for out in (first, second)
    ]
    return scores[0] == scores[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_any_exception_after_an_update_saves_it_and_its_line_of_metrics(run):
    """The exception of a callback that runs before the metrics are written."""
    start("output_dir=whole")
    for error in (KeyError, MemoryError, OSError, SystemExit):

        def fail(trainer, error=error):
            raise error("unforeseen")

        out = f"output_dir={error.__name__}"
        with pytest.raises(error, match="unforeseen"):
            start(out, callbacks=[After(2, fail)])
        assert updates(run / error.__name__) == 2
        assert [row["step"] for row in read_lines(run / error.__name__ / "metrics.jsonl")] == [1, 2]
        start(out, resume=True)
        assert same_end(run / error.__name__, run / "whole"), error


def of_weight(trainer):
    next(trainer.policy.parameters()).data[0, 0] = torch.nan


def of_value(trainer):
    trainer.policy.value.weight.data[3] = torch.inf


def of_optimizer(trainer):
    trainer.tensors()["0.exp_avg_sq" if "0.exp_avg_sq" in trainer.tensors() else next(iter(trainer.tensors()))].fill_(
        torch.inf
    )


@pytest.mark.parametrize("breaking, every", [(of_weight, 1), (of_weight, 0), (of_value, 0), (of_optimizer, 1)])
def test_a_state_that_is_not_finite_never_replaces_a_checkpoint(run, breaking, every):
    first = "ppo.checkpoint_every=1"
    start(first, "ppo.updates=1")
    with pytest.raises(
        FloatingPointError, match=r"was not written, because the .* is not finite|gradient norm"
    ) as error:
        start(f"ppo.checkpoint_every={every}", "ppo.updates=3", resume=True, callbacks=[After(2, breaking)])
    assert updates(run / "out") == 1
    assert "holds 1 update, and a resumed run continues from there" in "".join(error.value.__notes__)
    start(first, "ppo.updates=3", resume=True)
    assert updates(run / "out") == 3
    weights = load_file(run / "out" / "ppo" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
