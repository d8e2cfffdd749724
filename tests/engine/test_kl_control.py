"""The coefficients follow the measured KL as Ziegler et al. and the PPO paper say, and a resumed run has them as they were."""

import pytest
import torch

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import OptimConfig, PPOConfig, RunConfig
from rlhf_engine.train.kl_control import adapted_kl_coef, adapted_old_kl_coef
from rlhf_engine.train.ppo import old_policy_kl
from tests.engine.test_ppo import make_experience
from tests.engine.tiny_trainer import make_trainer

FAST = OptimConfig(lr=1e-2)


@pytest.mark.parametrize(
    "kl, expected",
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 512 / 10_000)),
        (60.0, 0.1 * (1 + 0.2 * 512 / 10_000)),
        (-3.0, 0.1 * (1 - 0.2 * 512 / 10_000)),
    ],
)
def test_s7_adaptive_coefficient_is_zieglers(kl, expected):
    assert adapted_kl_coef(0.1, kl, target=6.0, horizon=10_000, sequences=512) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "kl, expected", [(0.0066, 1.5), (0.0067, 3.0), (0.01, 3.0), (0.0149, 3.0), (0.0151, 6.0), (1.0, 6.0)]
)
def test_s14_beta_doubles_and_halves_at_one_and_a_half(kl, expected):
    assert adapted_old_kl_coef(3.0, kl, target=0.01) == expected


@pytest.mark.parametrize("unit, name", [("sequence", "kl"), ("token", "kl_per_token")])
def test_s7_the_trainer_adapts_by_the_kl_of_its_unit(unit, name):
    trainer = make_trainer(kl_control="adaptive", kl_target=0.3, kl_unit=unit, kl_horizon=64, optim=FAST)
    expected = trainer.kl_coef
    for _ in range(2):
        log = trainer.step()
        assert log["kl_coef"] == expected
        expected = adapted_kl_coef(expected, log[name], target=0.3, horizon=64, sequences=16)
        assert trainer.kl_coef == expected
    assert log["kl"] > log["kl_per_token"] > 0  # both are logged, whichever steers


def test_s14_beta_follows_the_kl_of_the_whole_update():
    settings = {"objective": "kl_penalty", "old_kl_coef": 1.0, "optim": FAST}
    assert make_trainer(**settings, old_kl_target=1e-7).step()["old_kl_coef"] == 1.0
    for target, after in ((1e-7, 2.0), (10.0, 0.5)):
        trainer = make_trainer(**settings, old_kl_target=target)
        log = trainer.step()
        assert trainer.old_kl_coef == after and log["old_kl"] > 0
    assert "old_kl" not in make_trainer(**settings).step()


def test_s14_the_loss_reads_the_adapted_beta():
    ends = []
    for beta in (1.0, 200.0):
        trainer = make_trainer(objective="kl_penalty", old_kl_coef=1.0, optim=FAST)
        trainer.old_kl_coef = beta
        trainer.step()
        ends.append(old_policy_kl(trainer.policy, make_experience(make_trainer()), 16, 1.0))
    assert ends[1] < 0.7 * ends[0]


def test_s14_measured_kl_is_that_of_the_distributions():
    """With every token of a one-step rollout as likely as the policy says, k3's mean is the KL up to the noise of sampling."""
    trainer = make_trainer()
    experience = make_experience(trainer)
    assert old_policy_kl(trainer.policy, experience, 4, 1.0) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        trainer.policy.lm_weight.mul_(1.1)
    rollout = experience.rollout
    expected, count = torch.zeros(()), 0
    for row in range(16):
        ids = rollout.input_ids[row, rollout.attention_mask[row].bool()][None]
        p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        new = trainer.policy.model(input_ids=ids).logits.log_softmax(-1)[0, p - 1 : -1].gather(-1, ids[0, p:, None])
        log_ratio = new[:, 0] - experience.old_logprobs[row, :n]
        expected += (log_ratio.exp() - 1 - log_ratio).sum().detach()
        count += n
    assert old_policy_kl(trainer.policy, experience, 4, 1.0) == pytest.approx(float(expected) / count, rel=1e-4)


def test_s10_epochs_stop_on_kl():
    settings = {"ppo_epochs": 4, "optim": FAST, "updates": 1}
    whole, stopped = make_trainer(**settings), make_trainer(**settings, stop_kl=1e-6)
    assert whole.step()["epochs"] == 4 and whole.optimizer_steps == 8
    assert stopped.step()["epochs"] == 1 and stopped.optimizer_steps == 2
    assert make_trainer(**settings, stop_kl=100.0).step()["epochs"] == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_control": "adaptive", "kl_target": 0.3, "kl_horizon": 64},
        {"objective": "kl_penalty", "old_kl_coef": 1.0, "old_kl_target": 1e-7},
        {"ppo_epochs": 3, "stop_kl": 1e-6},
    ],
)
def test_s7_s14_a_resumed_run_has_its_coefficients(tmp_path, settings):
    settings = settings | {"updates": 3, "optim": OptimConfig(lr=1e-2, schedule="linear")}
    straight = make_trainer(**settings)
    for _ in range(3):
        log = straight.step()
    first = make_trainer(**settings)
    first.step(), first.step()
    save_checkpoint(tmp_path / "checkpoint", first, None, RunConfig())
    second = make_trainer(**settings)
    resume(tmp_path / "checkpoint", second, RunConfig())
    assert second.state() == first.state() != make_trainer(**settings).state()
    resumed = second.step()
    same = [name for name in log if "second" not in name and name != "peak_rss_mb"]
    assert {name: resumed[name] for name in same} == {name: log[name] for name in same}
    assert second.state() == straight.state()


def test_s14_every_objective_trains():
    for objective, coef in (("clip", 0.0), ("kl_penalty", 1.0), ("ratio", 0.0), ("policy_gradient", 0.0)):
        log = make_trainer(objective=objective, old_kl_coef=coef, entropy_coef=0.01).step()
        assert all(abs(log[name]) < 100 for name in ("policy_loss", "value_loss", "entropy", "grad_norm")), objective
    assert PPOConfig().objective == "clip"
