"""KL coefficients are adapted as in Ziegler et al. and the PPO paper, and a resumed run restores them."""

import pytest
import torch

from rlhf_engine.checkpoint import resume, save_checkpoint
from rlhf_engine.config import OptimConfig, RunConfig
from rlhf_engine.ppo.kl_control import adapted_kl_coef, adapted_old_kl_coef, old_policy_kl
from tests.engine.helpers.experience import gradients, make_experience
from tests.engine.helpers.rollouts import sequence_of
from tests.engine.helpers.tiny_trainer import make_trainer

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
def test_s7_adaptive_coefficient_follows_ziegler(kl, expected):
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
    assert log["kl"] > log["kl_per_token"] > 0  # both are logged for either unit


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
        ends.append(old_policy_kl(trainer.policy, make_experience(make_trainer()), trainer.passes.size, 1.0))
    assert ends[1] < 0.7 * ends[0]


def test_s14_measured_kl_is_that_of_the_distributions():
    """The measured KL is 0 for the old policy, and after a change of the weights the mean of k3 from the model's logits."""
    trainer = make_trainer()
    experience = make_experience(trainer)
    assert old_policy_kl(trainer.policy, experience, trainer.passes.size, 1.0) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        trainer.policy.lm_weight.mul_(1.1)
    rollout = experience.rollout
    expected, count = torch.zeros(()), 0
    for row in range(16):
        ids = sequence_of(rollout, row)[None]
        p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        new = trainer.policy.model(input_ids=ids).logits.log_softmax(-1)[0, p - 1 : -1].gather(-1, ids[0, p:, None])
        log_ratio = new[:, 0] - experience.old_logprobs[row, :n]
        expected += (log_ratio.exp() - 1 - log_ratio).sum().detach()
        count += n
    assert old_policy_kl(trainer.policy, experience, trainer.passes.size, 1.0) == pytest.approx(
        float(expected) / count, rel=1e-4
    )


def test_s10_epochs_stop_on_kl():
    settings = {"ppo_epochs": 4, "optim": FAST, "updates": 1}
    whole, stopped = make_trainer(**settings), make_trainer(**settings, stop_kl=1e-6)
    assert whole.step()["epochs"] == 4 and whole.update_rule.optimizer_steps == 8
    assert stopped.step()["epochs"] == 1 and stopped.update_rule.optimizer_steps == 2
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
    same = [name for name in log if "second" not in name and not name.startswith("peak_")]
    assert {name: resumed[name] for name in same} == {name: log[name] for name in same}
    assert second.state() == straight.state()


def log_ratio_terms(objective, log_ratio, a):
    """Return the loss of one token with advantage `a` as a function of log(new / old), by the papers' formulas."""
    r = log_ratio.exp()
    if objective == "clip":
        return -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    if objective == "kl_penalty":  # beta 1, KL(old || new) by k3
        return -(r * a) + (r - 1 - log_ratio)
    return -r * a if objective == "ratio" else -log_ratio * a


@pytest.mark.parametrize(
    "objective, coef", [("clip", 0.0), ("kl_penalty", 1.0), ("ratio", 0.0), ("policy_gradient", 0.0)]
)
def test_s14_every_objective_has_the_gradient_of_its_formula(objective, coef):
    """The current policy differs from the sampling one. The formula is in float64 from the model's logits, without values."""
    trainer = make_trainer()
    experience = make_experience(trainer)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=noise))
    settings = {"objective": objective, "old_kl_coef": coef, "vf_coef": 0.0}
    ours, metrics = gradients(trainer, experience, 4, **settings)
    policy, rollout, loss = trainer.policy.double(), experience.rollout, 0.0
    policy.zero_grad()
    for row in range(16):
        ids = sequence_of(rollout, row)[None]
        p, n = int(rollout.prompt_lengths[row]), int(rollout.response_lengths[row])
        logprobs = policy.model(input_ids=ids).logits.log_softmax(-1)[0, p - 1 : -1].gather(-1, ids[0, p:, None])[:, 0]
        log_ratio = logprobs - experience.old_logprobs[row, :n].double()
        loss = loss + log_ratio_terms(objective, log_ratio, experience.advantages[row, :n].double()).sum()
    (loss / rollout.mask.sum()).backward()
    assert float(metrics["clipfrac"]) > 0 or objective != "clip"
    for name, parameter in policy.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        found = ours[f"model.{name}"].double()
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name)
