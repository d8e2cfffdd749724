"""A value function with its own trunk: gradients, warm-up, and resumption."""

import pytest
import torch

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import OptimConfig, RunConfig
from rlhf_engine.model import ActorCritic, FrozenCopy, frozen_copy
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.saving import load_policy
from tests.engine.helpers.experience import gradients, make_experience
from tests.engine.helpers.pretraining import make_stream
from tests.engine.helpers.rollouts import sequence_of
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import make_trainer, target_share, weights_of


def make_value_model(hidden_size=16):
    small = tiny("llama", seed=7, hidden_size=hidden_size, intermediate_size=24, head_dim=4, initializer_range=0.1)
    return RewardModel.from_causal_lm(small, seed=3)


def split(weights):
    """Return the weights of the policy and those of the value function."""
    policy = {name: weight for name, weight in weights.items() if not name.startswith("value.")}
    return policy, {name: weight for name, weight in weights.items() if name not in policy}


def test_s8_values_come_from_the_value_model():
    trainer = make_trainer(value_model=make_value_model())
    experience = make_experience(trainer)
    rollout, model = experience.rollout, trainer.policy.value
    assert float(rollout.values.abs().max()) == 0.0  # sampling computed no values
    for row in range(16):
        ids = sequence_of(rollout, row)[None]
        p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        hidden = model.trunk(input_ids=ids).last_hidden_state[0, p - 1 : -1]
        expected = hidden @ model.head.weight + model.head.bias
        torch.testing.assert_close(experience.old_values[row, :n], expected, rtol=1e-4, atol=1e-5)
        assert float(experience.old_values[row, n:].abs().sum()) == 0.0
    rescored = make_trainer(value_model=make_value_model(), old_logprobs="rescored")
    torch.testing.assert_close(make_experience(rescored).old_values, experience.old_values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("microbatch", [16, 5])
def test_s8_policy_and_value_gradients_do_not_mix(microbatch):
    """With a backbone, the policy's gradient does not depend on the value loss, which reaches all of the backbone."""
    trainer = make_trainer(value_model=make_value_model(), vf_coef=0.7)
    experience = make_experience(trainer)
    found, metrics = gradients(trainer, experience, microbatch, vf_coef=0.7)
    without, _ = gradients(trainer, experience, microbatch, vf_coef=0.0)
    policy, value = split(found)
    for name, gradient in split(without)[0].items():
        torch.testing.assert_close(policy[name], gradient, rtol=1e-5, atol=1e-8, msg=name)
    assert set(value) == {n for n, _ in trainer.policy.named_parameters() if n.startswith("value.")}
    model, rollout = trainer.policy.value.double(), experience.rollout
    model.zero_grad()
    loss = 0.0
    for row in range(16):
        ids = sequence_of(rollout, row)[None]
        p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        hidden = model.trunk(input_ids=ids).last_hidden_state[0, p - 1 : -1]
        values = hidden @ model.head.weight + model.head.bias
        loss = loss + 0.5 * (values - experience.returns[row, :n].double()).square().sum()
    loss = loss / rollout.mask.sum()
    (0.7 * loss).backward()
    assert float(metrics["value_loss"]) == pytest.approx(float(loss.detach()), rel=1e-3)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        ours = value[f"value.{name}"].double()
        torch.testing.assert_close(ours, parameter.grad, rtol=2e-3, atol=1e-3 * scale + 1e-9, msg=name)


@pytest.mark.parametrize("backbone", [False, True])
def test_s8_warm_up_changes_only_the_value_function(backbone):
    trainer = make_trainer(
        value_model=make_value_model() if backbone else None,
        value_warmup=1,
        kl_control="adaptive",
        kl_target=1.0,
        kl_horizon=64,
        optim=OptimConfig(lr=1e-2, weight_decay=0.1),
    )
    policy, value = split(weights_of(trainer))
    trainer.step()
    policy_after, value_after = split(weights_of(trainer))
    assert all(torch.equal(weight, policy_after[name]) for name, weight in policy.items())
    assert all(not torch.equal(weight, value_after[name]) for name, weight in value.items())
    assert trainer.kl_coef == trainer.config.kl_coef  # not adapted while the policy does not change
    trainer.step()
    policy_last, _ = split(weights_of(trainer))
    assert any(not torch.equal(weight, policy_last[name]) for name, weight in policy.items())


@pytest.mark.parametrize("backbone", [False, True])
def test_s8_a_run_resumed_in_its_warm_up_is_bitwise_the_same(tmp_path, backbone):
    def make():
        model = make_value_model() if backbone else None
        return make_trainer(value_model=model, value_warmup=1, updates=3, ema_decay=0.9)

    straight, first, second = make(), make(), make()
    straight.step(), straight.step()
    first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, RunConfig())
    resume(tmp_path / "checkpoint", second, RunConfig())
    second.step()
    after = weights_of(second)
    assert all(torch.equal(weight, after[name]) for name, weight in weights_of(straight).items())
    assert (tmp_path / "checkpoint" / "value_model").is_dir() == backbone
    loaded = load_policy(tmp_path / "checkpoint")
    assert loaded.value.shares_trunk != backbone


def test_s10_a_resumed_run_with_all_features_is_bitwise_the_same(tmp_path):
    """All state that changes between updates is in use, so that anything missing from a checkpoint shows."""

    def reward(rollout):
        return torch.where(rollout.response_lengths == 3, torch.nan, target_share(rollout))

    def make():
        return make_trainer(
            value_model=make_value_model(),
            pretrain=make_stream(),
            reward=reward,
            objective="kl_penalty",
            old_kl_coef=1.0,
            old_kl_target=1e-6,
            kl_control="adaptive",
            kl_target=0.5,
            kl_horizon=32,
            score_scale="running",
            nonfinite_scores="skip",
            missing_eos_score=-1.0,
            whiten_scope="minibatch",
            ppo_epochs=3,
            stop_kl=1e-5,
            ptx_coef=1.0,
            ptx_ratio=0.5,
            ema_decay=0.9,
            updates=4,
            optim=OptimConfig(lr=3e-3, schedule="cosine", eps_form="raw", warmup_steps=3),
        )

    straight, first, second = make(), make(), make()
    logs = [straight.step() for _ in range(4)]
    assert sum(log["scores_skipped"] for log in logs) > 0
    first.step(), first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, RunConfig())
    resume(tmp_path / "checkpoint", second, RunConfig())
    assert second.state() == first.state()
    for log in logs[2:]:
        resumed = second.step()
        for name in log:
            assert "second" in name or name.startswith("peak_") or resumed[name] == log[name], name
    assert second.state() == straight.state()
    for ours, theirs in (
        (second.policy, straight.policy),
        (second.update_rule.average.model, straight.update_rule.average.model),
    ):
        expected = dict(theirs.named_parameters())
        assert all(torch.equal(weight, expected[name]) for name, weight in ours.named_parameters())


def test_s8_the_reference_does_not_copy_the_value_model():
    policy = ActorCritic(tiny(), make_value_model())
    for copy in (frozen_copy(policy), FrozenCopy(policy).model):
        assert copy.value is None and policy.value is not None
        assert not any(parameter.requires_grad for parameter in copy.parameters())


def test_s16_without_a_baseline_the_values_are_zero():
    trainer = make_trainer(baseline="none", vf_coef=0.0, whiten_advantages=False, lam=1.0)
    experience = make_experience(trainer)
    assert float(experience.old_values.abs().max()) == 0.0
    torch.testing.assert_close(experience.advantages, experience.returns)
