"""The moving average of the weights: its recurrence, its saved folder, and resumption."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import RunConfig
from rlhf_engine.model.saving import load_policy
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of


def averages_of(trainer):
    return {name: parameter.clone() for name, parameter in trainer.update_rule.average.model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2_tied"])
def test_s10_average_is_the_recurrence_over_optimizer_steps(family):
    trainer = make_trainer(family, ema_decay=0.9, updates=1)
    expected, step = weights_of(trainer), trainer.update_rule.optimizer.step
    steps = []

    def watched():
        step()
        for name, weight in weights_of(trainer).items():
            expected[name] = 0.9 * expected[name] + 0.1 * weight
        steps.append(1)

    trainer.update_rule.optimizer.step = watched
    trainer.step()
    assert len(steps) == 4
    found, now = averages_of(trainer), weights_of(trainer)
    assert found.keys() == now.keys()
    for name, average in found.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(average, now[name]) for name, average in found.items())


def test_s10_average_is_saved_as_a_separate_model_and_is_resumed(tmp_path):
    straight, first, second = (make_trainer(ema_decay=0.9) for _ in range(3))
    straight.step(), straight.step()
    first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, RunConfig())
    resume(tmp_path / "checkpoint", second, RunConfig())
    second.step()
    after = averages_of(second)
    for name, average in averages_of(straight).items():
        assert torch.equal(average, after[name]), name
    ids = torch.arange(9)[None]
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint" / "ema").eval()(input_ids=ids).logits
    assert torch.equal(logits, first.update_rule.average.model.model(input_ids=ids).logits)
    assert not torch.equal(logits, first.policy.model(input_ids=ids).logits)
    head = load_policy(tmp_path / "checkpoint" / "ema").value
    assert torch.equal(head.weight, first.update_rule.average.model.value.weight)
    (tmp_path / "checkpoint" / "ema" / "value_head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"ema: the file value_head\.safetensors is missing"):
        resume(tmp_path / "checkpoint", make_trainer(ema_decay=0.9), RunConfig())


def test_s10_no_average_without_ema_decay(tmp_path):
    trainer = make_trainer()
    save_checkpoint(tmp_path / "checkpoint", trainer, None, RunConfig())
    assert trainer.update_rule.average is None and not (tmp_path / "checkpoint" / "ema").exists()
