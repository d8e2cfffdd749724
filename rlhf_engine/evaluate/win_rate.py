"""Win rate of one policy over a second one on the same prompts, with ties and a confidence interval.

Legend: M prompts; A and B are the numbers of answers of the two policies to each prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons won, with ties counted as half, and its 95% interval."""

    rate: float
    """(wins + ties / 2) / comparisons, the mean over prompts."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end of the 95% interval."""
    ties: float
    """Share of comparisons that are ties."""
    prompts: int
    """Number of prompts. The bootstrap resamples prompts, because answers to the same prompt are not independent."""

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def win_rate(
    first: Tensor | Sequence[Sequence[float]],  # (M, A), a judge's scores of the first policy's answers
    second: Tensor | Sequence[Sequence[float]],  # (M, B), of the second policy's answers to the same prompts
    *,
    margin: float = 0.0,
    resamples: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Return the win rate when every answer of the first policy is compared with every answer of the second one.

    Answers are compared within a prompt only:

        rate = mean over prompts of mean over pairs of [a > b + margin] + 1/2 [|a - b| <= margin]

    The interval is the percentile bootstrap over prompts (Efron and Tibshirani 1993, section 13.3).

    Raises:
        ValueError: the two differ in their number of prompts, a dimension is 0, or a score is not finite.
    """
    first = torch.as_tensor(first, dtype=torch.float64)
    second = torch.as_tensor(second, dtype=torch.float64)
    for name, scores in (("first", first), ("second", second)):
        if scores.dim() != 2 or 0 in scores.shape:
            raise ValueError(f"{name}: got shape {tuple(scores.shape)}, expected [prompts, answers], neither of them 0")
        if not scores.isfinite().all():
            raise ValueError(f"{name}: got a score that is not finite, expected numbers")
    if len(first) != len(second):
        raise ValueError(f"second: got {len(second)} prompts, expected {len(first)} as in first")
    gap = first[:, :, None] - second[:, None, :]
    return preference_rate(score_preferences(gap, margin).flatten(1), resamples=resamples, seed=seed)


def score_preferences(gap: Tensor, margin: float = 0.0) -> Tensor:
    """Return preferences for the first of two scores from their gap: 1 for better, 0 for worse, 1/2 within `margin`."""
    return (gap > margin).double() + 0.5 * (gap.abs() <= margin).double()


def preference_rate(
    preferences: Tensor,  # (M, A), for each comparison 1 where the first won, 0 where it lost, 1/2 for a tie
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Return the mean preference, with equal weight for every prompt, and its percentile-bootstrap interval over prompts.

    Raises:
        ValueError: no comparisons, or a preference outside [0, 1].
    """
    if preferences.dim() != 2 or 0 in preferences.shape:
        raise ValueError(
            f"preferences: got shape {tuple(preferences.shape)}, expected [prompts, comparisons], neither of them 0"
        )
    if not ((preferences >= 0) & (preferences <= 1)).all():
        raise ValueError("preferences: got one outside [0, 1], expected 1 for a win, 0 for a loss, 0.5 for a tie")
    per_prompt = preferences.double().mean(1)  # (M,)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(per_prompt), (resamples, len(per_prompt)), generator=generator)
    low, high = per_prompt[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return WinRate(float(per_prompt.mean()), low, high, float((preferences == 0.5).double().mean()), len(per_prompt))


def best_of_n(scores: Tensor, rewards: Tensor) -> Tensor:  # (M, N), (M, N) -> (M, 1)
    """Return the judge's score of the answer with the highest reward among the N answers to each prompt."""
    if scores.shape != rewards.shape:
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected {tuple(scores.shape)} as scores")
    return scores.gather(1, rewards.argmax(1, keepdim=True))
