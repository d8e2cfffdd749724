"""Checkpoints of all trainers: their contents, the layout of earlier releases, and checkpoints that `resume` refuses."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from rlhf_engine.checkpoint import fingerprint, resume, save_checkpoint
from rlhf_engine.config import OptimConfig, RewardConfig, RunConfig, SFTConfig
from rlhf_engine.data import Example
from rlhf_engine.model import LanguageModel
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.optim.state_dict import optimizer_tensors
from rlhf_engine.supervised.reward_model import RankedPrompt, RewardTrainer
from rlhf_engine.supervised.sft import SFTTrainer
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

EXAMPLES = [Example((5, 6), (8 + n, 9, 2)) for n in range(6)]
PROMPTS = [RankedPrompt(tuple(EXAMPLES[n : n + 3]), ((0, 1), (2, 0))) for n in range(4)]
OPTIM = OptimConfig(lr=1e-2)


def sft(dtype=torch.float32, log=None, state="resident", seed=3):
    config = SFTConfig(epochs=4, batch_size=2, evaluate_every=2, patience=9, optim=OPTIM)
    actor = LanguageModel(tiny().to(dtype))
    return SFTTrainer(actor, EXAMPLES, EXAMPLES[:2], config, pad_id=0, seed=seed, log=log, optimizer_state=state)


def rm(dtype=torch.float32, log=None, state="resident", seed=3):
    config = RewardConfig(epochs=4, batch_size=2, evaluate_every=3, optim=OPTIM)
    model = RewardModel.from_causal_lm(tiny().to(dtype), seed=1)
    return RewardTrainer(model, PROMPTS, PROMPTS[:2], config, pad_id=0, seed=seed, log=log, optimizer_state=state)


class Enough(Exception):
    """Raised to end training after the number of steps of a test."""


def train(trainer, until):
    def after():
        if trainer.done == until:
            raise Enough

    with pytest.raises(Enough):
        trainer.train(after)


def everything(trainer):
    tensors = trainer.tensors() | dict(trainer.weights())
    return trainer.state(), {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("make", [sft, rm])
@pytest.mark.parametrize("until", [1, 2, 5, 7])
@pytest.mark.parametrize(
    "dtype, state", [(torch.float32, "resident"), (torch.bfloat16, "resident"), (torch.float32, "host")], ids=str
)
def test_a_resumed_trainer_ends_like_an_uninterrupted_one(tmp_path, make, until, dtype, state):
    """Compare weights, optimizer state, minimum and all logged metrics, with a checkpoint between epochs and within one."""
    logs = [[], []]
    whole = make(dtype, lambda *row: logs[0].append(row), state)
    whole.train()
    first = make(dtype, lambda *row: logs[1].append(row), state)
    train(first, until)
    save_checkpoint(tmp_path / "run", first, None, RunConfig())
    second = make(dtype, lambda *row: logs[1].append(row), state)
    resume(tmp_path / "run", second, RunConfig())
    assert second.done == until
    second.train()
    assert logs[0] == logs[1]
    (state_a, tensors_a), (state_b, tensors_b) = everything(whole), everything(second)
    assert state_a == state_b and tensors_a.keys() == tensors_b.keys()
    assert all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)
    if make is sft:
        assert whole.finish() == second.finish()
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.weights(), second.weights(), strict=True))


@pytest.mark.parametrize("make", [sft, rm])
def test_a_resumed_run_begins_with_the_failed_evaluation(tmp_path, make):
    """The step before the evaluation is finished and logged, so nothing is logged twice."""
    logs = [[], []]
    make(log=lambda *row: logs[0].append(row)).train()
    first = make(log=lambda *row: logs[1].append(row))
    real = first.evaluate

    def fail():
        if first.done >= 6:
            raise Enough
        return real()

    first.evaluate = fail
    with pytest.raises(Enough):
        first.train()
    assert first.whole and first.done == 6
    save_checkpoint(tmp_path / "run", first, None, RunConfig())
    second = make(log=lambda *row: logs[1].append(row))
    resume(tmp_path / "run", second, RunConfig())
    second.train()
    assert logs[0] == logs[1]


def test_a_checkpoint_of_an_earlier_release_resumes(tmp_path):
    """The checkpoint has the layout of commit 4216677: no stage in trainer.json, and no keys that were added later."""
    first = make_trainer(ema_decay=0.9, score_scale="running")
    first.step()
    folder = tmp_path / "ppo"
    for place, policy in ((folder, first.policy), (folder / "ema", first.update_rule.average.model)):
        policy.model.save_pretrained(place)
        save_file(
            {"weight": policy.value.weight.data, "bias": policy.value.bias.data}, place / "value_head.safetensors"
        )
    tensors = optimizer_tensors(first.update_rule.optimizer)
    save_file(tensors, folder / "optimizer.safetensors")
    state = first.state() | {"seed": 1, "optimizer_tensors": len(tensors), "data": {}}
    state["reference"] = fingerprint(first.reference.weights())
    (folder / "trainer.json").write_text(json.dumps(state))
    settings = RunConfig().to_dict()
    del settings["sft"]["checkpoint_every"], settings["reward"]["checkpoint_every"]
    settings["ppo"]["checkpoint_every"] = 0
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    second = make_trainer(ema_decay=0.9, score_scale="running")
    resume(folder, second, RunConfig())
    assert second.state() == first.state() and second.updates_done == 1
    first.step()
    second.step()
    ours, theirs = weights_of(first), weights_of(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    save_checkpoint(tmp_path / "now", first, None, RunConfig())
    names = {path.name for path in (tmp_path / "now").iterdir()}
    assert names == {path.name for path in folder.iterdir()} | {"manifest.json"}


@pytest.mark.parametrize(
    "name, value",
    [
        ("planned_steps", [False]),
        ("planned_steps", [[4]]),
        ("planned_steps", []),
        ("limits", {"counts": {"warn_on.kl": "three"}, "last": {}}),
        ("limits", {"counts": []}),
        ("limits", {"counts": {}, "last": None}),
        ("passes", {"microbatch": [4]}),
        ("merges", "no"),
    ],
)
def test_a_value_of_another_structure_is_named(tmp_path, name, value):
    trainer, folder = make_trainer(), tmp_path / "ppo"
    save_checkpoint(folder, trainer, None, RunConfig())
    (folder / "manifest.json").unlink()
    state = json.loads((folder / "trainer.json").read_text())
    assert name in state and state.pop("manifest")
    (folder / "trainer.json").write_text(json.dumps(state))
    resume(folder, make_trainer(), RunConfig())
    (folder / "trainer.json").write_text(json.dumps(state | {name: value}))
    with pytest.raises(ValueError, match=rf"trainer\.json: got .* for {name}, expected a value like"):
        resume(folder, make_trainer(), RunConfig())


def damage(folder, change):
    tensors = load_file(folder / "optimizer.safetensors")
    change(tensors)
    save_file(tensors, folder / "optimizer.safetensors")
    state = json.loads((folder / "trainer.json").read_text())
    (folder / "trainer.json").write_text(json.dumps(state | {"optimizer_tensors": len(tensors)}))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tensors: tensors.pop("best.model.norm.weight"),
            r"optimizer\.safetensors: got None for best\.model\.norm",
        ),
        (
            lambda tensors: tensors.update({"best.x": torch.zeros(1)}),
            r"optimizer\.safetensors: got .* for best\.x, expected None",
        ),
        (lambda tensors: tensors.pop("0.exp_avg"), r"optimizer\.safetensors: the tensor 0\.exp_avg is missing"),
    ],
)
def test_a_missing_or_unexpected_tensor_is_named(tmp_path, change, message):
    trainer = sft()
    train(trainer, 2)
    save_checkpoint(tmp_path / "run", trainer, None, RunConfig())
    damage(tmp_path / "run", change)
    with pytest.raises(ValueError, match=message):
        resume(tmp_path / "run", sft(), RunConfig())


def test_checkpoints_of_a_different_run_are_refused(tmp_path):
    """A checkpoint of a different stage or seed, or with different data or settings, raises an error that names it."""
    trainer = rm()
    train(trainer, 2)
    folder, data = tmp_path / "run", {"data.comparisons": "a"}
    save_checkpoint(folder, trainer, None, RunConfig(), data)
    with pytest.raises(ValueError, match="got a checkpoint of the stage rm, expected the stage sft"):
        resume(folder, SwappedStage(rm(), "sft"), RunConfig(), data)
    with pytest.raises(ValueError, match="got a run with seed 3, expected 4"):
        resume(folder, rm(seed=4), RunConfig(), data)
    with pytest.raises(ValueError, match=r"data\.comparisons: the content has changed"):
        resume(folder, rm(), RunConfig(), {"data.comparisons": "b"})
    changed = RunConfig(reward=RewardConfig(batch_size=4))
    with pytest.raises(ValueError, match=r"reward\.batch_size: got 4, expected 8 to go on"):
        resume(folder, rm(), changed, data)
    free = RunConfig(reward=RewardConfig(checkpoint_every=7, path="x"), sft=SFTConfig(epochs=9))
    resume(folder, rm(), free, data)


class SwappedStage:
    """A trainer with the name of a different stage."""

    def __init__(self, trainer, stage):
        self.trainer, self.stage = trainer, stage

    def __getattr__(self, name):
        return getattr(self.trainer, name)
