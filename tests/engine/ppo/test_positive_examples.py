"""`ppo.positive_nll_coef` and `ppo.positive_score`: the responses, the gradient, the metrics, and settings that are refused."""

from dataclasses import replace

import pytest
import torch

from rlhf_engine.config import PPOConfig, load_config
from rlhf_engine.model import ActorCritic
from rlhf_engine.ppo.experience import Scored, advantages
from rlhf_engine.ppo.minibatch import minibatch_backward
from rlhf_engine.ppo.nonfinite import data_of, take_experience, tensors_of
from tests.engine.helpers.rollouts import make_rollout, random_experience
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import make_trainer

SEQUENCES, POSITIVE = torch.tensor([6, 1, 4, 0, 3]), torch.tensor([False, True, False, False, True, True, False])


def gradients(experience, microbatch, **settings):
    """Return metrics and gradients of a minibatch with two positive examples."""
    policy = ActorCritic(tiny())
    settings = {"rollout_batch": 7, "minibatch": 7, "whiten_advantages": False} | settings
    config = PPOConfig(**settings, microbatch=microbatch)
    metrics = minibatch_backward(policy, experience, SEQUENCES, config, 0.7)
    return metrics, {k: p.grad for k, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_the_gradient_is_that_of_two_losses(aggregation):
    """Micro-batches without a positive example, and tokens that are not in the policy term, change nothing."""
    experience = random_experience(make_rollout())
    mask = experience.rollout.mask
    experience = replace(experience, positive=POSITIVE, kept=mask & (torch.arange(mask.shape[1]) % 2 == 0))
    settings = {"aggregation": aggregation, "positive_nll_coef": 0.3}
    (metrics, whole), (split_metrics, split) = (gradients(experience, size, **settings) for size in (7, 1))
    _, first = gradients(replace(experience, positive=None), 7, aggregation=aggregation)
    second = replace(experience, kept=mask & POSITIVE[:, None], advantages=torch.full_like(experience.advantages, 0.3))
    others = {"objective": "policy_gradient", "vf_coef": 0.0, "aggregation": aggregation, "cliprange_value": 0.2}
    _, more = gradients(replace(second, positive=None), 7, **others)
    for name, got in whole.items():
        expected = first[name] + more.get(name, 0)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(split[name], got, rtol=1e-4, atol=1e-6, msg=name)
    assert metrics["num_nll_tokens"] == mask[[1, 4]].sum() and metrics["nll_loss"] > 1
    for name in ("nll_loss", "num_nll_tokens", "policy_loss"):
        torch.testing.assert_close(split_metrics[name], metrics[name], rtol=1e-5, atol=1e-6)


def test_scores_of_the_reward_function_decide():
    """Scores before scaling and penalties; NaN handling and files of single samples keep the choice."""
    trainer = make_trainer(positive_nll_coef=0.1, positive_score=0.25)
    rollout = trainer.generator.generate(trainer.prompts(0, 16), torch.arange(16))
    raw, zeros = torch.arange(16) / 16, torch.zeros_like(rollout.logprobs)
    scored = Scored(rollout, -raw, raw, rollout.logprobs, zeros, rollout.logprobs)
    found, log = advantages(scored, trainer.config, 0.0)
    assert torch.equal(found.positive, torch.arange(16) > 4) and log["positive_share"] == 11 / 16
    part = take_experience(found, torch.tensor([5, 2]))
    assert part.positive.tolist() == data_of(tensors_of(part)).positive.tolist() == [True, False]
    without, log = advantages(scored, replace(trainer.config, positive_nll_coef=0.0, positive_score=0.0), 0.0)
    assert without.positive is None and "positive_share" not in log


def test_an_update_logs_the_loss():
    log = make_trainer(positive_nll_coef=0.5, positive_score=0.01).step()
    assert 0 < log["positive_share"] <= 1 and log["nll_loss"] > 0 and log["num_nll_tokens"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["positive_nll_coef=-0.1"], r"positive_nll_coef: got -0\.1"),
        (["positive_nll_coef=0.1", "objective=trpo"], r"positive_nll_coef: got 0\.1, .*other than 'trpo' reads it"),
        (["positive_score=0.5"], r"positive_score: got 0\.5, .*only positive_nll_coef above 0 reads it"),
        (["positive_nll_coef=0.1", "positive_score=.inf"], r"positive_score: got inf, expected a finite number"),
        (["positive_example_nll_weight=0.1"], r"did you mean 'ppo\.positive_nll_coef'"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [f"ppo.{setting}" for setting in settings])
