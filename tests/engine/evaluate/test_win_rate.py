"""Win rates compared with hand-computed ones, and the coverage of their intervals."""

import pytest
import torch

from rlhf_engine.evaluate import best_of_n, win_rate


def test_win_rate_by_hand():
    """Prompt 1 has a win and a tie, prompt 2 a loss and a win."""
    found = win_rate([[2.0], [5.0]], [[1.0, 2.0], [6.0, 4.0]])
    assert found.rate == pytest.approx((0.75 + 0.5) / 2)
    assert found.ties == pytest.approx(1 / 4)
    assert found.prompts == 2


def test_win_rates_of_the_two_sides_add_up_to_one():
    first, second = torch.randint(0, 4, (2, 50, 3), generator=torch.Generator().manual_seed(1)).double()
    one, other = win_rate(first, second), win_rate(second, first)
    assert one.rate + other.rate == pytest.approx(1)
    assert one.low + other.high == pytest.approx(1)


def test_margin_makes_ties():
    assert win_rate([[1.0]], [[0.5]]).rate == 1.0
    assert win_rate([[1.0]], [[0.5]], margin=0.5).rate == 0.5


def test_the_interval_covers_the_truth_in_about_95_of_100_trials():
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(200):
        wins = (torch.rand(100, 1, generator=generator) < 0.7).double()
        found = win_rate(wins, torch.full((100, 1), 0.5), resamples=400)
        covered += found.low <= 0.7 <= found.high
    assert 180 <= covered <= 199


def test_certain_results_have_a_narrow_interval():
    found = win_rate(torch.ones(20, 1), torch.zeros(20, 1))
    assert (found.rate, found.low, found.high) == (1.0, 1.0, 1.0)
    assert str(found) == "1.000 [1.000, 1.000]"


@pytest.mark.parametrize(
    "first, second, message",
    [
        ([[1.0]], [[1.0], [2.0]], "second: got 2 prompts, expected 1"),
        ([1.0], [[1.0]], r"first: got shape \(1,\)"),
        (torch.zeros(0, 1), torch.zeros(0, 1), r"first: got shape \(0, 1\)"),
        ([[float("nan")]], [[1.0]], "not finite"),
    ],
)
def test_bad_scores_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        win_rate(first, second)


def test_best_of_n_takes_the_judges_score_of_the_highest_reward():
    scores, rewards = torch.tensor([[1.0, 9.0, 5.0], [4.0, 2.0, 8.0]]), torch.tensor([[0.1, 0.2, 0.9], [3.0, 1.0, 2.0]])
    assert best_of_n(scores, rewards).tolist() == [[5.0], [4.0]]
    with pytest.raises(ValueError, match="rewards"):
        best_of_n(scores, rewards[:1])
