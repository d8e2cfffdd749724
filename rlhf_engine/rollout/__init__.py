"""Sampling responses and scoring them again."""

from rlhf_engine.rollout.generator import Generator
from rlhf_engine.rollout.rollout import Rollout
from rlhf_engine.rollout.scoring import score_rollout, value_rollout

__all__ = ["Generator", "Rollout", "score_rollout", "value_rollout"]
