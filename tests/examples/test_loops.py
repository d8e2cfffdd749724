"""The policies of the examples learn. The test of TRL's example is in `peers`."""

import pytest

from tests.examples.helpers.scripts import example


@pytest.mark.parametrize("name", ["pytorch_loop", "verl_loop", "openrlhf_loop"])
def test_policy_learns_the_rewarded_token(name):
    """The score is the number of rewarded tokens of twelve: below 1 at the start (1 in 32 tokens), above 5 at the end."""
    scores = example(name).train()
    assert scores[0] < 1 and scores[-1] > 5, scores


def test_cartpole_reaches_475():
    cartpole = example("cartpole")
    assert cartpole.mean_return(cartpole.train(seed=0)) >= 475
