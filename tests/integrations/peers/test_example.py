"""The policy of the GRPO example learns."""

from tests.examples.helpers.scripts import example


def test_grpo_with_the_fused_head_learns_the_rewarded_token():
    rewards = example("trl_grpo").train(steps=30)
    assert rewards[0] < 0.15 and max(rewards[-5:]) > 0.5, rewards
