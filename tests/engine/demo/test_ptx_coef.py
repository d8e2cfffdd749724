"""`python -m benchmarks.ptx_coef`: which coefficient it chooses, and whether it reports that its bounds hold."""

import pytest

from benchmarks.ptx_coef import choose
from rlhf_engine.evaluate import WinRate


def rates(**of):
    return {name: WinRate(rate, rate, rate, 0.0, 10) for name, rate in ({"SFT": 0.5} | of).items()}


@pytest.mark.parametrize(
    ("ptx", "losses", "chosen", "words"),
    [
        ({"a": 0.79, "b": 0.76}, {"a": 5.1, "b": 2.0}, "PPO-ptx, b", "PPO-ptx, b: 0.20 of"),  # a loses too much
        ({"a": 0.77, "b": 0.76}, {"a": 4.9, "b": 2.0}, "PPO-ptx, a", "PPO-ptx, a: 0.49 of"),  # the better of two
        ({"a": 0.74, "b": 0.70}, {"a": 4.9, "b": 2.0}, None, "+0.060 below PPO's (bound 0.05: MISSED)"),
        ({"a": 0.79}, {"a": 5.1}, None, "MISSED"),
    ],
)
def test_s9_the_coefficient_with_the_highest_win_rate_within_the_bounds_is_chosen(ptx, losses, chosen, words):
    of = {f"PPO-ptx, {name}": rate for name, rate in ptx.items()}
    lost = {"SFT": 0.0, "PPO": 10.0} | {f"PPO-ptx, {name}": loss for name, loss in losses.items()}
    found, verdict = choose(rates(PPO=0.8, **of), lost)
    assert found == chosen and words in verdict


def test_s9_no_coefficient_is_chosen_if_ppo_lost_no_perplexity():
    found, verdict = choose(rates(PPO=0.8, **{"PPO-ptx, 1": 0.8}), {"SFT": 0.0, "PPO": -0.1, "PPO-ptx, 1": 0.0})
    assert found is None and "nothing for PPO-ptx to keep" in verdict
