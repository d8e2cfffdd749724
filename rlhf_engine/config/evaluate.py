"""Settings of the comparison of two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Count, NonNegative, Section


@dataclass(frozen=True)
class EvalConfig(Section):
    """Comparison of two models on the same prompts (`rlhf eval`)."""

    candidate: str | None = None
    """Folder of the model whose win rate is measured."""
    baseline: str | None = None
    """Folder of the model that the candidate is compared with."""
    candidate_prefix: str | None = None
    """Text file whose content precedes every prompt of the candidate, such as few-shot examples for a model that does
    not follow instructions. If None, nothing does."""
    baseline_prefix: str | None = None
    """Text file whose content precedes every prompt of the baseline. If None, nothing does."""
    stop: str | None = None
    """Text at which a response is cut, such as the blank line before the next few-shot example. If None, responses are
    not cut."""
    judge: str | None = None
    """Judge of the responses: the folder of a reward model, a Python function as `module:function` or
    `file.py:function`, a model on a server with OpenAI's API as `openai:URL#MODEL`, such as
    `openai:http://localhost:8000/v1#qwen` (section http), or `file` for judgments written by people. A function
    receives a list of prompts, a list of responses A and a list of responses B. It returns a list of preferences for A
    in [0, 1], or two lists of scores, one for A and one for B."""
    judge_batch: Count = 64
    """Pairs of responses per call of a Python judge."""
    split: Literal["train", "validation", "test"] = "test"
    """Split of data.prompts on which the models are compared."""
    limit: Count | None = None
    """Number of prompts, from the beginning of the split. If None, all prompts are used. Prompts and responses stay in
    memory until the judge has read them."""
    samples: Count = 1
    """Responses per prompt and model; response k of the candidate is compared with response k of the baseline."""
    margin: NonNegative = 0.0
    """Largest difference between two scores that counts as a tie, in units of the score. Ignored for a judge that
    returns preferences."""
    resamples: Count = 2000
    """Bootstrap samples of the prompts, from which the 95% interval of the win rate is computed."""
    text: str | None = None
    """File of pretraining text, with blank lines between documents, on which the perplexity of both models is measured.
    If None, perplexity is not measured."""
