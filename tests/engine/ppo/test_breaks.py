"""A PPO run that is interrupted, and a resumed run whose input files have changed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlhf_engine.config import load_config
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.ppo import update as ppo
from rlhf_engine.recipes import run_ppo, run_rm
from tests.engine.helpers.cli_run import new_model, new_run, rlhf, write_lines
from tests.engine.helpers.tiny_trainer import OnUpdate, make_trainer, weights_of

REWARD = """
from pathlib import Path

def reward(prompts, answers):
    calls = Path("calls.txt")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    if len(calls.read_text()) == 4 and not Path("repaired").exists():
        raise {error}
    return [float(len(answer)) for answer in answers]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return new_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return new_run(tmp_path, base)


def config_of(run, *more):
    zero = ("reward.function=rewards.py:reward", "ppo.value_init=zero", "ppo.updates=4", "ppo.score_scale=running")
    return load_config(run / "run.yaml", [*zero, *more])


@pytest.mark.parametrize("error", ["KeyError('no idea')", "KeyboardInterrupt"])
def test_s10_updates_before_a_failed_one_are_saved(run, error):
    """The third update's reward raises: the first two updates are saved, and the resumed run equals an uninterrupted one."""
    (run / "rewards.py").write_text(REWARD.format(error=error))
    with pytest.raises((ValueError, KeyboardInterrupt)):
        run_ppo(config_of(run))
    assert json.loads((run / "out" / "ppo" / "trainer.json").read_text())["updates_done"] == 2
    (run / "repaired").touch()
    assert len(run_ppo(config_of(run), resume=True)) == 2
    run_ppo(config_of(run, "output_dir=whole"))
    whole, broken = (load_file(run / name / "ppo" / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_s10_nothing_is_saved_before_the_first_update(run):
    (run / "rewards.py").write_text(REWARD.format(error="KeyError('no idea')"))
    (run / "calls.txt").write_text("xx")
    with pytest.raises(ValueError, match="no idea"):
        run_ppo(config_of(run))
    assert [path.name for path in (run / "out").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("minibatch, call, whole", [(16, 3, True), (8, 5, True), (8, 4, False)])
def test_s10_whole_is_false_only_if_the_failed_update_changed_a_weight(monkeypatch, minibatch, call, whole):
    """A gradient is not finite: in the first minibatch of the third update, or in the second minibatch of the second update."""
    trainer = make_trainer(minibatch=minibatch, ppo_epochs=1, updates=9, score_scale="running")
    calls, ends, real = [], [], ppo.minibatch_backward

    def backward(*arguments, **options):
        metrics = real(*arguments, **options)
        calls.append(1)
        if len(calls) == call:
            trainer.policy.lm_weight.grad.fill_(torch.nan)
        return metrics

    monkeypatch.setattr(ppo, "minibatch_backward", backward)
    trainer.callbacks.append(OnUpdate(lambda number, log: ends.append((trainer.state(), weights_of(trainer)))))
    with pytest.raises(FloatingPointError, match=f"optimizer step {call}"):
        trainer.train()
    assert trainer.whole == whole
    if whole:
        state, weights = ends[-1]
        assert trainer.state() == state and trainer.updates_done == 2
        assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(trainer).items())
        assert all(parameter.grad is None for parameter in trainer.policy.parameters())
        trainer.step()
        assert trainer.whole and trainer.updates_done == 3


def test_s10_a_resumed_run_needs_the_same_inputs(run, capsys):
    """Paths may change; the contents of the files and the reward model may not."""
    run_rm(load_config(run / "run.yaml"))
    (run / "text.txt").write_text("I do not know\n\n" * 30)
    sets = [f"reward.path={run / 'out' / 'rm'}", "ppo.ptx_coef=1", "data.pretrain=text.txt"]
    command = ("ppo", "--config", run / "run.yaml")
    assert rlhf(capsys, *command, sets=sets)[0] == 0
    more = [*sets, "ppo.updates=2"]

    def refused(key, *changed):
        code, _, shown = rlhf(capsys, *command, "--resume", sets=[*more, *changed])
        return code == 2 and f"{key}: the content has changed since the run of {run / 'out' / 'ppo'} began" in shown

    lines = [{"prompt": f"q{i}", "user_id": "u"} for i in range(6)]
    write_lines(run / "others.jsonl", [*lines[:5], {"prompt": "x", "user_id": "u"}])
    write_lines(run / "turned.jsonl", reversed(lines))
    assert refused("data.prompts", "data.prompts=others.jsonl") and refused("data.prompts", "data.prompts=turned.jsonl")
    (run / "other.txt").write_text("I do not know\n\n" * 31)
    assert refused("data.pretrain", "data.pretrain=other.txt")
    judge = RewardModel.load(run / "out" / "rm")
    judge.centre(0.5)
    shutil.copytree(run / "out" / "rm", run / "rm")
    judge.save(run / "rm")
    assert refused("reward.path", "reward.path=rm")
    write_lines(run / "moved.jsonl", lines)
    (run / "text.txt").rename(run / "moved.txt")
    moved = ["data.prompts=moved.jsonl", "data.pretrain=moved.txt"]
    code, _, shown = rlhf(capsys, *command, "--resume", sets=[*more, *moved])
    assert code == 0, shown
