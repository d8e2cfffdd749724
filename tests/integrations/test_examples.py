"""The policies of the examples learn. The test of TRL's example is in `peers`."""

import pytest

from benchmarks.examples import cartpole, openrlhf_loop, pytorch_loop, verl_loop


@pytest.mark.parametrize("loop", [pytorch_loop, verl_loop, openrlhf_loop], ids=lambda m: m.__name__.split(".")[-1])
def test_policy_learns_the_rewarded_token(loop):
    """The score is the number of rewarded tokens of twelve: below 1 at the start (1 in 32 tokens), above 5 at the end."""
    scores = loop.train()
    assert scores[0] < 1 and scores[-1] > 5, scores


def test_cartpole_reaches_475():
    assert cartpole.mean_return(cartpole.train(seed=0)) >= 475
