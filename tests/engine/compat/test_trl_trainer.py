"""`PPOTrainer` with TRL's interface: training, callbacks, metrics, files, resumption and adapters. TRL is not needed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from rlhf_engine.compat import trl_update
from rlhf_engine.compat.trl import PPOConfig, PPOTrainer
from tests.engine.helpers.trl_scripts import PAD, SETTINGS, language_model, parts, prompts, tokenizer, weights

METRICS = (
    "eps objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores policy/approxkl_avg "
    "policy/clipfrac_avg loss/policy_avg loss/value_avg val/clipfrac_avg policy/entropy_avg val/ratio val/ratio_var "
    "val/num_eos_tokens lr episode epoch"
)
ONE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_ppo_epochs": 1}


class Events(TrainerCallback):
    def __init__(self):
        self.seen, self.logs = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        assert kwargs["model"].policy is not None and kwargs["model"].value_model is not None
        self.seen.append("begin")

    def on_log(self, args, state, control, logs, **kwargs):
        self.seen.append("log")
        self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append("step")

    def on_save(self, args, state, control, **kwargs):
        self.seen.append("save")

    def on_train_end(self, args, state, control, **kwargs):
        self.seen.append("end")


class StopAfterTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def make(folder, callbacks=(), models=None, **settings):
    np.random.seed(0)
    args = PPOConfig(output_dir=str(folder), **SETTINGS | {"stop_token": "eos"} | settings)
    return PPOTrainer(args=args, callbacks=list(callbacks), **parts(**models or {}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a trainer after three updates with a checkpoint each, its callback and its folder."""
    folder, events = tmp_path_factory.mktemp("trained"), Events()
    trainer = make(folder, [events], save_strategy="steps", save_steps=1, gradient_checkpointing=True)
    start = weights(trainer)
    trainer.train()
    return trainer, start, events, folder


def test_callbacks_and_metrics(trained):
    trainer, start, events, _ = trained
    assert events.seen == ["begin", *["log", "step", "save"] * 3, "end"]
    assert [sorted(one) for one in events.logs] == [sorted(METRICS.split())] * 3
    assert [one["episode"] for one in events.logs] == [8, 16, 24] and trainer.state.global_step == 3
    assert all(np.isfinite(list(one.values())).all() for one in events.logs)
    rates = [one["lr"] for one in events.logs]
    assert rates == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    after = weights(trainer)
    assert all((after[key] != start[key]).any() for key in start)


def test_a_checkpoint_continues_with_the_same_bits(trained, tmp_path):
    trainer, _, events, folder = trained
    again = Events()
    resumed = make(tmp_path, [again], gradient_checkpointing=True)
    torch.manual_seed(99)
    np.random.seed(99)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert again.seen == ["begin", *["log", "step"] * 2, "end"]
    for ours, theirs in zip(again.logs, events.logs[1:], strict=True):
        assert {k: v for k, v in ours.items() if k != "eps"} == {k: v for k, v in theirs.items() if k != "eps"}
    expected = weights(trainer)
    for key, weight in weights(resumed).items():
        assert torch.equal(weight, expected[key]), key
    assert len(resumed.state.log_history) == 3


def test_the_newest_checkpoint_is_found_and_old_ones_are_deleted(tmp_path):
    trainer = make(tmp_path, [StopAfterTwo()], save_strategy="steps", save_steps=1, save_total_limit=1, **ONE)
    trainer.train()
    assert [path.name for path in Path(tmp_path).glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = make(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **ONE)
    resumed.train()
    assert [line["step"] for line in resumed.state.log_history] == [1, 2, 3]
    again = make(tmp_path, **ONE)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(resumed).values(), strict=True))


def test_saved_models_load_with_transformers(trained, tmp_path):
    trainer, *_ = trained
    trainer.save_model(str(tmp_path))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value_model")
    saved = {f"policy.{k}": v for k, v in policy.state_dict().items()}
    saved |= {f"value.{k}": v for k, v in value.state_dict().items()}
    for key, weight in weights(trainer).items():
        assert torch.equal(saved[key], weight), key
    assert (tmp_path / "tokenizer.json").is_file() and not list(tmp_path.rglob("*.bin"))


def test_completions(tmp_path, capsys):
    trainer = make(tmp_path, models={"eval_dataset": prompts(6)}, per_device_eval_batch_size=3, **ONE)
    table = trainer.generate_completions()
    assert [len(column) for column in table.values()] == [6, 6, 6]
    assert list(table) == ["query", "model response", "score"] and "model response" in capsys.readouterr().out
    assert trainer.generate_completions(sampling=True)["query"] == table["query"][:3]
    assert make(tmp_path, **ONE).generate_completions() == {}


def test_adapters_of_policy_and_value_model(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")

    def lora():
        torch.manual_seed(7)
        return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=None)

    def adapted(folder, **settings):
        models = {"peft_config": lora(), "value_peft_config": lora(), "ref_model": None}
        return make(folder, models=models, **ONE, **settings)

    trainer = adapted(tmp_path, save_strategy="steps", save_steps=1)
    start = weights(trainer)
    trainer.train()
    after, names = weights(trainer), {k for k in start if "lora_" in k or "score.modules_to_save" in k}
    assert {key for key in start if (after[key] != start[key]).any()} == names
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(trainer.state.log_history[-1]["objective/kl"]) > 1e-3
    resumed = adapted(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(weight, after[key]) for key, weight in weights(resumed).items())
    trainer.save_model(str(tmp_path / "final"))
    stored = peft.load_peft_weights(str(tmp_path / "final" / "value_model"))
    assert any("score" in key for key in stored) and any("lora_A" in key for key in stored)


def test_a_pad_id_that_the_model_does_not_have(tmp_path):
    """TRL's script adds a pad token and leaves the embeddings as they are."""
    extended = tokenizer(pad_token=None)
    extended.add_special_tokens({"pad_token": "[PAD]"})
    assert extended.pad_token_id == 40
    trainer = make(tmp_path, models={"processing_class": extended}, bf16=True, **ONE)
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_reference_is_copied_if_none_is_given(tmp_path):
    trainer = make(tmp_path, models={"ref_model": None}, **ONE | {"total_episodes": 8})
    trainer.train()
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    frozen = trainer.reference.model.model.state_dict()
    assert all(torch.equal(weight, frozen[key]) for key, weight in language_model(0).state_dict().items())


def test_a_micro_batch_in_several_passes(tmp_path, monkeypatch):
    """On a CPU a micro-batch is split; weights and metrics are those of one pass."""
    found = []
    for tokens in (10_000, 1):
        monkeypatch.setattr(trl_update, "CPU_PASS_TOKENS", tokens)
        trainer, sizes = make(tmp_path / str(tokens), **ONE | {"total_episodes": 16}), []
        run = trainer.update._pass
        monkeypatch.setattr(
            trainer.update,
            "_pass",
            lambda batch, part, n, run=run, sizes=sizes: sizes.append(len(part)) or run(batch, part, n),
        )
        trainer.train()
        for log in trainer.state.log_history:
            del log["eps"]
        found.append((sizes, weights(trainer), trainer.state.log_history))
    (whole, expected, logs), (parted, got, other_logs) = found
    assert (whole, parted) == ([8] * 2, [1] * 16)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-5, msg=name)
    for log, other in zip(logs, other_logs, strict=True):
        assert other == pytest.approx(log, abs=1e-5, nan_ok=True)


def test_given_optimizer_and_scheduler(tmp_path):
    models = parts()
    trained = [*models["model"].parameters(), *models["value_model"].parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1**step)
    trainer = make(tmp_path, models=models | {"optimizers": (optimizer, scheduler)}, **ONE)
    start = weights(trainer)
    trainer.train()
    assert [line["lr"] for line in trainer.state.log_history] == pytest.approx([0.5, 0.05, 0.005])
    assert any((weight != start[key]).any() for key, weight in weights(trainer).items())


def test_a_gradient_that_is_not_finite(tmp_path):
    trainer = make(tmp_path, learning_rate=1e-2, vf_coef=1e38, **ONE)
    with torch.no_grad():
        trainer.value_model.score.weight.fill_(1e10)
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match=r"training diverged: got a gradient norm of .*lower learning_rate"):
        trainer.train()
    assert all(torch.equal(weight, before[key]) for key, weight in weights(trainer).items())


MODEL = language_model(0)
WRONG = {
    "same reference": ({"model": MODEL, "ref_model": MODEL}, {}, "ref_model is the same object as model"),
    "no dataset": ({"train_dataset": None}, {}, "train_dataset: got NoneType"),
    "small dataset": ({"train_dataset": prompts(4)}, {}, "train_dataset: got 4 rows, expected at least 8"),
    "two evaluation sets": ({"eval_dataset": {"a": prompts(4)}}, {}, "eval_dataset: got a dict"),
    "no pad": ({"processing_class": tokenizer(pad_token=None)}, {}, "processing_class has no pad_token; add one"),
    "minibatches": ({}, {"num_mini_batches": 3}, "num_mini_batches: got 3, expected a divisor of 8"),
    "whitening": (
        {},
        {"num_mini_batches": 2, "whiten_rewards": True},
        "whiten_rewards: got True with minibatches of 4",
    ),
    "mixed updates": (
        {},
        {"per_device_train_batch_size": 3, "num_mini_batches": 3, "num_ppo_epochs": 1},
        "gradient_accumulation_steps: got 2 for 3 micro-batches per update",
    ),
    "value": (
        {"value_model": language_model(4)},
        {},
        "value_model: got a LlamaForCausalLM, expected a sequence classifier",
    ),
    "reward": ({"reward_model": language_model(4)}, {}, "reward_model: got a LlamaForCausalLM"),
    "policy": ({"model": parts()["value_model"]}, {}, "model: got LlamaForSequenceClassification, which has no output"),
    "adapter": ({"peft_config": {"r": 2}}, {}, "peft_config: got dict, expected a config of peft"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(tmp_path, name):
    models, settings, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make(tmp_path, models=models, **settings)


def test_wrong_batches_and_checkpoints(trained, tmp_path):
    *_, folder = trained
    empty = prompts(8).map(lambda row: {"input_ids": [PAD] * 3})
    with pytest.raises(ValueError, match="train_dataset: got a prompt without tokens"):
        make(tmp_path, models={"train_dataset": empty}, **ONE).train()
    trainer = make(tmp_path, **ONE)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .* has no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"value_model: expected the checkpoint of a run with the same models"):
        other = folder.parent / "other"
        _copy(folder / "checkpoint-1", other, lambda config: config | {"hidden_size": 32})
        trainer.train(resume_from_checkpoint=str(other))


def _copy(source, target, change):
    """Copy a checkpoint with a different config of its value model."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            place.write_bytes(path.read_bytes())
    path = target / "value_model" / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
