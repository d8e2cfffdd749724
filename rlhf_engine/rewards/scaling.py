"""Scores of responses for PPO: missing EOS, scores that are not finite, and normalization. Shapes: B sequences.

The order of operations is that of "The N implementation details of RLHF with PPO" (Huang et al. 2024): the reward function's
scores are normalized first. Then the score of a response without EOS is replaced or reduced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.config import PPOConfig
from rlhf_engine.distributed.ranks import Ranks
from rlhf_engine.model import Reward
from rlhf_engine.rewards.user_code import SampleError
from rlhf_engine.rollout import Rollout

RewardFunction = Reward[Rollout]
"""Returns one float score for each sequence of a rollout, [B]."""


class DealtReward:
    """A reward function that every rank calls with its share of a rollout; it returns the scores of all ranks.

    `inner` is called once per rollout on each rank that has responses, so a function that compares the responses of a call
    compares those of one rank.
    """

    def __init__(self, inner: RewardFunction, ranks: Ranks) -> None:
        self.inner, self.ranks = inner, ranks

    def __call__(self, rollout: Rollout) -> Tensor:  # (B,)
        """Return the scores of a rollout that all ranks have."""
        shares = self.ranks.shares(rollout.prompt_lengths + rollout.response_lengths)
        rows = shares[self.ranks.rank]
        if not len(rows):
            return self.ranks.join(torch.zeros(0, device=rows.device), shares)
        try:
            found = self.inner(rollout.take(rows))
        except SampleError as error:
            error.row = int(rows[error.row])
            raise
        if not isinstance(found, Tensor) or found.shape != rows.shape:
            return found  # `score_answers` refuses it
        return self.ranks.join(found.detach().float().to(rows.device), shares)


class ScoreScale:
    """Normalization of scores to mean 0 and standard deviation 1. `kind` selects the rollouts that define the moments.

    batch: the current rollout. first: the first rollout of the run, sampled from the initial policy (OpenAI's normalization of
    the reward model before training), or the first rollout whose scores are not all equal. running: all rollouts so far.
    none: scores are not changed.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def __call__(self, scores: Tensor) -> Tensor:  # (B,) -> (B,)
        """Return the normalized scores, and update the moments."""
        if self.kind == "none" or not len(scores):
            return scores
        if self.kind == "batch" or (self.kind == "first" and not self._spread()):
            self.count, self.mean, self.squares = 0, 0.0, 0.0
        if self.kind != "first" or not self.count:
            self._add(scores.double())
        spread = self._spread()
        return (scores - self.mean) / spread if spread else scores - self.mean

    def _spread(self) -> float:
        """Return the standard deviation so far, or 0 for equal scores, whose computed deviation is only rounding."""
        spread = math.sqrt(self.squares / self.count) if self.count else 0.0
        return spread if spread > 1e-6 * max(1.0, abs(self.mean)) else 0.0

    def _add(self, scores: Tensor) -> None:
        """Combine the moments of `scores` with those so far (Chan et al. 1979)."""
        count, mean = len(scores), float(scores.mean())
        squares = float((scores - mean).square().sum())
        total, gap = self.count + count, mean - self.mean
        self.squares += squares + gap * gap * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    def state(self) -> dict[str, int | float]:
        """Return the moments under their names in a checkpoint."""
        return {"score_count": self.count, "score_mean": self.mean, "score_squares": self.squares}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.count, self.mean, self.squares = (state[f"score_{name}"] for name in ("count", "mean", "squares"))


def score_answers(
    rollout: Rollout, reward_fn: RewardFunction, config: PPOConfig, scale: ScoreScale, first: int = 0
) -> tuple[Rollout, Tensor, Tensor]:
    """Return the rollout without skipped responses, the scores [B] for PPO, and the scores [B] before scaling and penalties.

    With `missing_eos_score`, a response without EOS gets that score and is not passed to `reward_fn`. Otherwise
    `missing_eos_penalty` is subtracted from its score. With `nonfinite_scores` "skip", responses whose score is not finite are
    removed from the rollout. `first` is the number in the run of the rollout's first sample.

    Raises:
        ValueError: if a score is not finite and `nonfinite_scores` is "stop", or no score is finite; if `reward_fn` does not
            return one score per response; if `reward_fn` raises ValueError. The message begins with the sample's number in the
            run for a SampleError, and with those of the first and the last scored sample for any other ValueError of
            `reward_fn`. `scale` is not changed.
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
                f"reward: got {type(found).__name__}, expected a tensor of {len(rows)} scores; use `text_reward` to turn a "
                "function of texts into a reward"
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
                f"this rollout), expected {len(rows)} finite scores; set ppo.nonfinite_scores=skip to skip such samples"
            )
        kept = finite.nonzero()[:, 0]
        rollout, raw, scored = rollout.take(kept), raw[kept], scored[kept]
    if config.missing_eos_score is not None:
        raw[~scored] = config.missing_eos_score
    scores = raw.clone()
    scores[scored] = scale(raw[scored])
    return rollout, scores - config.missing_eos_penalty * ~rollout.ended, raw
