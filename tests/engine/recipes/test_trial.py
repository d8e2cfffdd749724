"""Trials before a stage trains: the output folder, the disk, the reward and the judge; a failed one leaves nothing."""

import shutil
from collections import namedtuple

import pytest
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel

from rlhf_engine.recipes import trial
from tests.engine.helpers.cli_run import new_run, rlhf

REWARD = "def reward(prompts, answers):\n    open('calls', 'a').write(f'{len(answers)}\\n')\n    return [0.5] * len(answers)\n"
USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD)
    return new_run(tmp_path, base)


SETS = {"sft": [], "rm": [], "ppo": ["reward.function=rewards.py:reward", "ppo.value_init=zero"]}


def refused(run, capsys, command, *sets):
    """Run a stage that must not train; return its line."""
    code, _, err = rlhf(capsys, command, "--config", run / "run.yaml", sets=[*SETS[command], *sets])
    assert code == 2 and err.startswith("rlhf: ") and err.count("\n") == 1, err
    assert not (run / "out").exists() and not list(run.glob(".rlhf-trial-*"))
    return err


@pytest.mark.parametrize("command", SETS)
def test_a_model_that_cannot_be_written_is_refused(run, capsys, monkeypatch, command):
    """Like a generation_config.json that transformers 5.0 loads and does not write."""

    def refuse(self, *_, **options):
        raise ValueError("GenerationConfig is invalid: \n- `temperature`: `do_sample` is False")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuse)
    err = refused(run, capsys, command)
    assert "cannot write the model: ValueError: GenerationConfig is invalid: - `temperature`" in err
    assert "so nothing is trained: correct the files of model.path" in err


@pytest.mark.parametrize("command, kind", [("sft", LlamaForCausalLM), ("rm", LlamaModel), ("ppo", LlamaForCausalLM)])
def test_weights_that_change_when_they_are_saved_are_noticed(run, capsys, monkeypatch, command, kind):
    save = kind.save_pretrained

    def changed(self, folder, **options):
        state = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        name = next(name for name in state if "norm" in name)
        state[name] += 1
        save(self, folder, state_dict=state)

    monkeypatch.setattr(kind, "save_pretrained", changed)
    assert "norm.weight is lost or changed when the model is saved and loaded again" in refused(run, capsys, command)


@pytest.mark.parametrize("command", SETS)
def test_large_models_are_tried_without_their_large_weights(run, capsys, monkeypatch, command):
    written, save = [], PreTrainedModel.save_pretrained

    def record(self, folder, state_dict=None, **options):
        written.append(state_dict and sum(tensor.nbytes for tensor in state_dict.values()))
        save(self, folder, state_dict=state_dict, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", record)
    monkeypatch.setattr(trial, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(trial, "_PART_BYTES", 2000)
    code, _, err = rlhf(capsys, command, "--config", run / "run.yaml", sets=SETS[command])
    assert code == 0, err
    assert 0 < written[0] <= 2000 and written[1:] == [None] * len(written[1:])


@pytest.mark.parametrize("command, section", [("sft", "sft"), ("rm", "reward"), ("ppo", "ppo")])
def test_a_disk_without_space_for_the_checkpoints_is_refused(run, capsys, monkeypatch, command, section):
    """A checkpoint has the model, two moments of each weight, and for SFT the weights of the lowest validation loss."""
    free = [10**9]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10**10, 0, free[0]))
    code, _, err = rlhf(capsys, command, "--config", run / "run.yaml", sets=[*SETS[command], "output_dir=first"])
    assert code == 0, err
    model = sum(file.stat().st_size for file in (run / "first" / command).glob("*.safetensors"))
    model -= (run / "first" / command / "optimizer.safetensors").stat().st_size if command == "ppo" else 0
    checkpoint = model * (4 if command == "sft" else 3)
    free[0] = int(1.9 * checkpoint)
    err = refused(run, capsys, command)
    assert "output_dir: got" in err and f"{section}.checkpoint_every=0, which needs one copy" in err
    free[0] = int(0.9 * checkpoint)
    assert "output_dir: got" in refused(run, capsys, command, f"{section}.checkpoint_every=0")
    free[0] = int(2.1 * checkpoint)
    assert rlhf(capsys, command, "--config", run / "run.yaml", sets=SETS[command])[0] == 0


def test_a_reward_function_is_tried_on_two_samples(run, capsys):
    code, _, err = rlhf(capsys, "ppo", "--config", run / "run.yaml", sets=SETS["ppo"])
    assert code == 0, err
    assert (run / "calls").read_text().split() == ["2", "4"]  # the trial, and the rollout of the update
    (run / "rewards.py").write_text(REWARD.replace("0.5", "'much'"))
    code, _, err = rlhf(capsys, "ppo", "--config", run / "run.yaml", "--overwrite", sets=SETS["ppo"])
    assert code == 2 and "got 'much', expected a number" in err
    assert "; the reward was tried on two samples, and nothing is trained" in err


def test_a_judge_is_tried_before_the_rounds(run, capsys):
    (run / "judges.py").write_text(
        "def good(prompts, a, b):\n    return [0.5] * len(a)\n\n\ndef bad(prompts, a, b):\n    return [b for b in a]\n"
    )
    judges = ["iterate.judge=judges.py:good", "eval.judge=judges.py:bad", "iterate.prompts=4"]
    code, _, err = rlhf(capsys, "iterate", "--config", run / "run.yaml", sets=judges)
    assert code == 2 and "eval.judge: judge judges.py:bad: sample 0: got 'Yes.', expected a finite number" in err
    assert not (run / "out").exists()


def test_the_folder_of_a_trial_that_was_killed_is_deleted(run, capsys):
    left = run / "out" / ".rlhf-trial-killed"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"a large file")
    assert rlhf(capsys, "sft", "--config", run / "run.yaml")[0] == 0
    assert not list((run / "out").glob(".rlhf-trial-*"))
