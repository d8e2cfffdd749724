"""Settings of what comes after training: comparing models, rounds of training, the figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.schema import Count, NonNegative, Positive, Section


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


@dataclass(frozen=True)
class IterateConfig(Section):
    """Rounds of generate, rank, reward model, PPO (`rlhf iterate`)."""

    rounds: Count = 2
    """How many rounds; a finished run goes on when this grows."""
    start: Literal["previous", "sft"] = "previous"
    """Model that a round's PPO starts from, and that its KL is measured to: the policy of the round before, or model.path."""
    judge: str | None = None
    """Who ranks the new answers: a judge as in `eval.judge`, or `file` to wait for somebody's rankings."""
    prompts: Count = 64
    """Prompts of the training split that are answered and ranked in a round, other ones in each."""
    completions: Count = 4
    """Answers to each of them; identical and empty ones are left out."""

    def check(self) -> None:
        """A ranking has at least two places."""
        if self.completions < 2:
            raise ValueError(f"completions: got {self.completions}, expected at least 2 to compare")


@dataclass(frozen=True)
class FigureConfig(Section):
    """The paper's figure in miniature (`rlhf figure`): every stage at several model sizes."""

    widths: tuple[Count, ...] = (64, 128, 256)
    """Hidden sizes of the models; the baseline is the SFT model of the last one."""
    head_size: Count = 32
    """Width of an attention head; it divides every hidden size."""
    shots: Count = 3
    """Demonstrations put in front of a prompt for the prompted base model."""
    samples: Count = 2
    """Answers to each test prompt by each model."""
    prompts: Count | None = None
    """Answer the first so many test prompts; null answers all."""
    ptx_coef: Positive = 0.02
    """ppo.ptx_coef of the PPO-ptx policy; the PPO policy next to it has none. `python -m benchmarks.ptx_coef` chose it."""

    def check(self) -> None:
        """Attention heads tile the hidden state."""
        for width in self.widths:
            if width % self.head_size:
                raise ValueError(f"widths: got {width}, expected a multiple of head_size {self.head_size}")
        if not self.widths:
            raise ValueError("widths: got none, expected at least one")
