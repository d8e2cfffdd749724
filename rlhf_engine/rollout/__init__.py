"""Sampling of responses, and recomputation of their log-probs."""

from rlhf_engine.rollout.generator import Generator
from rlhf_engine.rollout.rollout import Rollout, joined, logprob_deviation, recompute, reference_logprobs
from rlhf_engine.rollout.stopping import EOS, LENGTH, STOP_REASONS, STOP_STRING, STOP_TOKEN

__all__ = [
    "EOS",
    "LENGTH",
    "STOP_REASONS",
    "STOP_STRING",
    "STOP_TOKEN",
    "Generator",
    "Rollout",
    "joined",
    "logprob_deviation",
    "recompute",
    "reference_logprobs",
]
