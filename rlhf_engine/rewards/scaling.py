"""From answers to the scores that PPO learns from: who is scored, what is not a number, on which scale.

The order is that of "The N implementation details of RLHF with PPO" (Huang et al. 2024): the reward function's scores are
normalised first, then what an answer without EOS gets takes its place or is taken off. Shapes: B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.config import PPOConfig
from rlhf_engine.model import Reward
from rlhf_engine.rewards.user_code import SampleError
from rlhf_engine.rollout import Rollout

RewardFunction = Reward[Rollout]
"""Gives one float score for each sequence of a rollout, [B]."""


class ScoreScale:
    """Moves the reward function's scores to mean 0 and standard deviation 1, by the moments that `kind` says.

    batch: those of this rollout. first: those of the run's first rollout, which the reference policy wrote (OpenAI's
    normalisation of the reward model before training), or of the first whose scores differ at all. running: those of all
    rollouts so far. none: nothing is moved.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def __call__(self, scores: Tensor) -> Tensor:  # (B,) -> (B,)
        if self.kind == "none" or not len(scores):
            return scores
        if self.kind == "batch" or (self.kind == "first" and not self._spread()):
            self.count, self.mean, self.squares = 0, 0.0, 0.0
        if self.kind != "first" or not self.count:
            self._add(scores.double())
        spread = self._spread()
        return (scores - self.mean) / spread if spread else scores - self.mean

    def _spread(self) -> float:
        """The standard deviation so far; 0 for scores that are all the same, which say nothing: their spread is rounding."""
        spread = math.sqrt(self.squares / self.count) if self.count else 0.0
        return spread if spread > 1e-6 * max(1.0, abs(self.mean)) else 0.0

    def _add(self, scores: Tensor) -> None:
        """Join the moments of `scores` to those so far (Chan et al. 1979)."""
        count, mean = len(scores), float(scores.mean())
        squares = float((scores - mean).square().sum())
        total, gap = self.count + count, mean - self.mean
        self.squares += squares + gap * gap * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    def state(self) -> dict[str, int | float]:
        """The moments, under the names that a checkpoint knows them by."""
        return {"score_count": self.count, "score_mean": self.mean, "score_squares": self.squares}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.count, self.mean, self.squares = (state[f"score_{name}"] for name in ("count", "mean", "squares"))


def score_answers(
    rollout: Rollout, reward_fn: RewardFunction, config: PPOConfig, scale: ScoreScale, first: int = 0
) -> tuple[Rollout, Tensor, Tensor]:
    """The answers that stay in the rollout, the scores [B] that PPO learns from, and those before any scale or penalty [B].

    With `missing_eos_score` an answer without EOS gets that, and `reward_fn` never sees it; otherwise it loses
    `missing_eos_penalty`. An answer whose score is not finite leaves the rollout if `nonfinite_scores` is "skip"; if not, or
    if none is left, ValueError, which names it by its number in the run (`first` is that of the rollout's first) and leaves
    all state as it was. So is a sample told by `reward_fn` in a SampleError. Any other ValueError of `reward_fn` is raised
    again behind the numbers of the first and the last sample that it was given. ValueError too unless there is one score an
    answer.
    """
    scored = rollout.ended if config.missing_eos_score is not None else torch.ones_like(rollout.ended)
    rows = scored.nonzero()[:, 0]
    raw = torch.zeros(len(rollout), device=rollout.mask.device)
    if len(rows):
        seen = rollout if len(rows) == len(rollout) else rollout.take(rows)
        try:
            found = reward_fn(seen)
        except SampleError as error:
            raise ValueError(f"sample {first + int(rows[error.row])} of the run: {error}") from error.__cause__
        except ValueError as error:
            asked = f"samples {first + int(rows[0])} to {first + int(rows[-1])} of the run"
            raise ValueError(f"{asked}: {error}") from error
        if not isinstance(found, Tensor):
            raise ValueError(
                f"reward: got {type(found).__name__}, expected a tensor of {len(rows)} scores; `text_reward` makes a reward "
                "of a function of texts"
            )
        if found.shape != (len(rows),):
            raise ValueError(f"reward: got scores of shape {tuple(found.shape)}, expected {len(rows)} finite scores")
        raw[rows] = found.to(raw)
    finite = raw.isfinite()
    if not bool(finite.all()):
        bad = (~finite).nonzero()[:, 0].tolist()
        if config.nonfinite_scores == "stop" or len(bad) == len(rollout):
            numbers = ", ".join(str(first + row) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise ValueError(
                f"reward: got {float(raw[bad[0]])} for sample {numbers} of the run ({len(bad)} of {len(rollout)} in "
                f"this rollout), expected {len(rows)} finite scores; ppo.nonfinite_scores=skip leaves such samples out"
            )
        kept = finite.nonzero()[:, 0]
        rollout, raw, scored = rollout.take(kept), raw[kept], scored[kept]
    if config.missing_eos_score is not None:
        raw[~scored] = config.missing_eos_score
    scores = raw.clone()
    scores[scored] = scale(raw[scored])
    return rollout, scores - config.missing_eos_penalty * ~rollout.ended, raw
