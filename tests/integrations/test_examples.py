"""The examples do what they say; TRL's is in `peers`."""

import pytest

from benchmarks.examples import cartpole, openrlhf_loop, pytorch_loop, verl_loop


@pytest.mark.parametrize("loop", [pytorch_loop, verl_loop, openrlhf_loop], ids=lambda m: m.__name__.split(".")[-1])
def test_the_liked_token_is_learnt(loop):
    """One in 32 tokens at first, most of twelve in the end."""
    scores = loop.train()
    assert scores[0] < 1 and scores[-1] > 5, scores


def test_cartpole_reaches_475():
    assert cartpole.mean_return(cartpole.train(seed=0)) >= 475
