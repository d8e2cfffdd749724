"""`ppo.importance`: weights and masks of the sampled tokens in an update, its metrics, and settings that it rejects."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_engine.config import ImportanceConfig, PPOConfig, RolloutConfig, load_config
from rlhf_engine.model import ActorCritic
from rlhf_engine.ppo.minibatch import minibatch_backward
from rlhf_kernels import IMPORTANCE_METRICS, importance_weights
from tests.engine.helpers.rollouts import make_rollout, random_experience
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import make_trainer

FILTERED = RolloutConfig(max_prompt_tokens=8, max_response_tokens=10, batch_size=16, temperature=0.6, top_p=0.7)
LOGGED = tuple(f"importance_{name}" for name in IMPORTANCE_METRICS if name != "num_tokens")


def run_update(**settings):
    """Return the log, the experience and the weights after one update with filtered sampling."""
    trainer, seen = make_trainer(rollout=FILTERED, minibatch=16, ppo_epochs=2, **settings), []
    original = trainer.update_rule

    def update(experience, step):
        seen.append(experience)
        return original(experience, step)

    update.state, update.load_state, update.optimizer = original.state, original.load_state, original.optimizer
    trainer.update_rule = update
    log = trainer.step()
    return log, seen[0], [p.detach().clone() for p in trainer.policy.parameters()]


def test_importance_cap_is_short_for_truncated_token_weights():
    log, experience, weights = run_update(importance_cap=0.705)
    other_log, other, other_weights = run_update(importance=ImportanceConfig("token", high=0.705))
    assert torch.equal(experience.weights, other.weights) and other.kept is None
    assert all(map(torch.equal, weights, other_weights))
    assert all(log[name] == other_log[name] for name in LOGGED)
    ratio = (experience.old_logprobs - experience.rollout.sampling_logprobs).exp().clamp(max=0.705)
    mask = experience.rollout.mask
    torch.testing.assert_close(experience.weights[mask], ratio[mask])
    assert 0 < log["importance_above_share"] < 1 and log["importance_rejected_share"] == 0


def test_masked_sequences_and_the_metrics():
    rule = ImportanceConfig("sequence", "mask", low=0.1, high=0.9)
    log, experience, _ = run_update(importance=rule)
    rollout = experience.rollout
    expected = importance_weights(
        experience.old_logprobs,
        rollout.sampling_logprobs,
        rollout.mask,
        level="sequence",
        action="mask",
        low=0.1,
        high=0.9,
    )
    assert torch.equal(experience.kept, expected.mask) and torch.equal(experience.weights, expected.weights)
    share = 1 - experience.kept.sum() / rollout.mask.sum()
    assert 0.1 < share < 0.9 and log["importance_rejected_share"] == pytest.approx(float(share))
    assert log["num_tokens"] == experience.kept.sum()
    page = Path(__file__).parents[3].joinpath("docs/reference/metrics.md").read_text()
    assert set(LOGGED) <= set(log) and all(f"`{name}`" in page for name in LOGGED)


@pytest.mark.parametrize("microbatch", [2, 7])
def test_a_rejected_sequence_gives_the_gradient_of_a_batch_without_it(microbatch):
    """The value loss keeps all tokens; the policy term and the entropy bonus have the tokens that remain."""
    rejected, settings = torch.tensor([1, 4]), {"rollout_batch": 7, "minibatch": 7, "entropy_coef": 0.1}
    rollout = make_rollout()
    experience = random_experience(rollout)
    kept = rollout.mask.clone()
    kept[rejected] = False
    others = torch.tensor([n for n in range(7) if n not in rejected])

    def gradients(sequences, kept=None, **more):
        policy = ActorCritic(tiny())
        config = PPOConfig(**settings | more, microbatch=microbatch, whiten_advantages=False)
        minibatch_backward(policy, replace(experience, kept=kept), sequences, config, 0.7)
        return {k: p.grad for k, p in policy.named_parameters() if p.grad is not None}

    everyone = torch.arange(7)
    got = gradients(everyone, kept, vf_coef=0.0)
    for name, expected in gradients(others, vf_coef=0.0).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6)
    values = gradients(everyone, kept)
    for name, gradient in gradients(everyone).items():
        if name.startswith("value"):
            torch.testing.assert_close(values[name], gradient)


def test_bounds_that_exclude_everything_leave_the_policy_unchanged():
    rule = ImportanceConfig("token", "mask", low=5, high=6)
    log, experience, _ = run_update(importance=rule, vf_coef=0.0)
    assert not experience.kept.any() and not experience.weights.any()
    assert log["importance_rejected_share"] == 1 and log["importance_ess"] == 0
    assert log["policy_loss"] == log["grad_norm"] == log["num_tokens"] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["ppo.importance.high=2"], ["ppo.importance: high: got 2.0 with level 'none'"]),
        (["ppo.importance.action=mask"], ["action: got 'mask' with level 'none'"]),
        (["ppo.importance.level=token", "ppo.importance.low=0.5"], ["low: got 0.5", "'truncate' has no lower bound"]),
        (["ppo.importance={level: token, action: mask}"], ["low and high are not set", "'mask'"]),
        (["ppo.importance={level: token, action: clip, low: 3, high: 2}"], ["low: got 3.0 with high 2.0"]),
        (["ppo.importance={level: token, metric: k3, high: 2}"], ["metric: got 'k3'", "only action 'mask'"]),
        (["ppo.importance={level: token, action: mask, metric: k3, high: -1}"], ["high: got -1.0", "at least 0"]),
        (["ppo.importance.level=tokens"], ["ppo.importance.level", "'tokens'", "'token'"]),
        (["ppo.importance={level: token, high: 2}"], ["ppo.importance.level: got token", "'rescored'"]),
        (
            ["ppo.importance={level: token, high: 2}", "ppo.importance_cap=2", "rollout.top_k=5"],
            ["importance", "only importance_cap None reads it"],
        ),
        (["ppo.importance={level: token, high: 2}", "ppo.objective=trpo", "rollout.top_k=5"], ["importance", "'trpo'"]),
    ],
)
def test_settings_that_nothing_would_read_are_rejected(settings, words):
    with pytest.raises(ValueError) as caught:
        load_config(None, settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_settings_with_an_effect_are_accepted():
    rule = "ppo.importance={level: geometric, action: mask, metric: k1, low: -0.1, high: 0.1}"
    for more in ("ppo.old_logprobs=rescored", "rollout.top_p=0.9", "rollout.repetition_penalty=1.1"):
        assert load_config(None, [rule, more]).ppo.importance.low == -0.1


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("vllm_importance_sampling_mode", "ppo.importance.level"),  # TRL
        ("rollout_is_threshold", "ppo.importance.high"),  # verl
        ("truncated_importance_sampling_ratio_min", "ppo.importance.low"),  # NeMo-RL
        ("is_correction_mode", "ppo.importance.action"),  # OpenRLHF
        ("tis_level", "ppo.importance.level"),  # slime
    ],
)
def test_the_names_of_other_trainers_are_explained(name, ours):
    with pytest.raises(ValueError, match=f"unknown key 'ppo.{name}'.*{ours}"):
        load_config(None, [f"ppo.{name}=2"])
