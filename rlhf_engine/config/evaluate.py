"""Settings of what comes after training: comparing models, rounds of training, the figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Count, NonNegative, Section


@dataclass(frozen=True)
class EvalConfig(Section):
    """A contest of two models on the same prompts (`rlhf eval`)."""

    candidate: str | None = None
    """Folder of the model whose win rate is asked for."""
    baseline: str | None = None
    """Folder of the model that it is compared with."""
    candidate_prefix: str | None = None
    """Text file put in front of every prompt of the candidate: few-shot examples for a model that follows no instructions."""
    baseline_prefix: str | None = None
    """The same for the baseline."""
    stop: str | None = None
    """Text at which an answer is cut, such as the blank line before a next few-shot example; null cuts nothing."""
    judge: str | None = None
    """Who compares two answers: a reward model's folder, a Python function as `module:function` or `file.py:function`, or
    `file` for people. A function takes lists of prompts, of answers A and of answers B; it gives a list of preferences for A
    in [0, 1], or two lists of scores."""
    judge_batch: Count = 64
    """Pairs of answers that a Python function gets at a time."""
    split: Literal["train", "validation", "test"] = "test"
    """Split of data.prompts that both models answer."""
    limit: Count | None = None
    """Answer the first so many prompts of the split; null answers all. Prompts and answers stay in memory for the judge."""
    samples: Count = 1
    """Answers to each prompt by each model; the k-th of one is compared with the k-th of the other."""
    margin: NonNegative = 0.0
    """Scores that differ by no more than this are a tie; a judge that gives preferences does not read it."""
    resamples: Count = 2000
    """Bootstrap samples of the prompts, of which the 95% interval is taken."""
    text: str | None = None
    """Pretraining text, documents apart by a blank line, on which both models' perplexity is measured; null measures none."""
