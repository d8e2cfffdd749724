"""Training a reward model on rankings: every completion goes through the model once, whatever the number of its pairs.

Legend: B completions, P pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_engine.config import RewardConfig
from rlhf_engine.data import (
    EXAMPLES,
    Codec,
    Comparison,
    Example,
    RankedBatch,
    RecordCodec,
    length_batches,
    lengths_of,
    pad_sequences,
    rank_batch,
)
from rlhf_engine.metrics import progress
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.optim.adamw import OptimizerState, build_optimizer, optimizer_step
from rlhf_engine.supervised.sft import Log

SCORED_TOGETHER = 64
"""Sequences that `score_examples` reads in one pass."""


@dataclass(frozen=True)
class RankedPrompt:
    """The completions of one prompt as tokens, and its pairs."""

    completions: tuple[Example, ...]
    """K of them."""
    pairs: tuple[tuple[int, int], ...]
    """(better, worse) indices of all pairs that are not tied."""

    def __len__(self) -> int:
        """Tokens of the longest completion with its prompt."""
        return max(map(len, self.completions))


def _encode(ranked: RankedPrompt) -> list[int]:
    rows = [EXAMPLES.encode(completion) for completion in ranked.completions]
    return [len(rows), *map(len, rows), *chain(*rows, *ranked.pairs)]


def _decode(row: NDArray[np.int32]) -> RankedPrompt:
    count = int(row[0])
    *rows, pairs = np.split(row[1 + count :], np.cumsum(row[1 : 1 + count]))
    return RankedPrompt(tuple(map(EXAMPLES.decode, rows)), tuple(map(tuple, pairs.reshape(-1, 2).tolist())))


RANKED_PROMPTS: RecordCodec[RankedPrompt] = RecordCodec(_encode, _decode)
"""Prompts with their completions and pairs."""


@dataclass(frozen=True)
class RankingEvaluation:
    """A reward model on held-out rankings."""

    step: int
    """Optimiser steps done."""
    loss: float
    """Mean of the K-way loss over prompts, in nats a pair."""
    accuracy: float
    """Share of untied pairs that are ordered as the labeler did; equal scores count half."""
    margin: float
    """Mean of `r_better - r_worse` over untied pairs."""
    calibration_error: float
    """Mean gap between `sigmoid(r_1 - r_2)` and the share of pairs where 1 was preferred, over ten equal bins."""
    bins: tuple[tuple[float, float, int], ...]
    """(mean predicted probability, share preferred, pairs) of each bin that has pairs."""


def encode_comparison(comparison: Comparison, codec: Codec) -> RankedPrompt | None:
    """Tokens of a comparison; None when all its completions are tied, which teaches nothing."""
    pairs = comparison.pairs()
    if not pairs:
        return None
    prompt = codec.encode_prompt(comparison.prompt)
    answers = tuple(codec.join(prompt, text) for text in comparison.completions)
    return RankedPrompt(answers, tuple(pairs))


def ranking_loss(scores: Tensor, batch: RankedBatch) -> Tensor:
    """K-way ranking loss (Ouyang et al. 2022, equation 1), the mean over prompts of their mean over pairs.

        loss = -1 / prompts * sum_prompts 1 / pairs(prompt) * sum_pairs log sigmoid(r_better - r_worse)

    `scores` is [B] float32. All pairs of a prompt are one batch element; a tied pair is not a pair.
    """
    device = scores.device
    gaps = scores[batch.better.to(device)] - scores[batch.worse.to(device)]
    return -(batch.weights.to(device) * logsigmoid(gaps)).sum()


def fit_reward_model(
    model: RewardModel,
    train: Sequence[RankedPrompt],
    validation: Sequence[RankedPrompt],
    config: RewardConfig,
    *,
    pad_id: int,
    seed: int,
    optimizer_state: OptimizerState = "resident",
    log: Log | None = None,
) -> tuple[RankingEvaluation, ...]:
    """Trains for `config.epochs` and returns every evaluation on the held-out rankings; the last one is the model's.

    Raises:
        ValueError: an empty training or validation set.
    """
    for name, prompts in (("train", train), ("validation", validation)):
        if not prompts:
            raise ValueError(f"{name}: got no rankings with an untied pair, expected at least one")
    optimizer = build_optimizer(model, config.optim, optimizer_state)
    total = config.epochs * -(-len(train) // config.batch_size)
    history = []
    with progress(total, "reward model", unit="step") as bar:
        for step, batch in enumerate(_epochs(train, config, pad_id, Random(seed))):
            loss = _train_step(model, batch)
            norm, rate = optimizer_step(optimizer, config.optim, step, total)
            bar.update()
            if log:
                log(step + 1, {"loss": loss, "grad_norm": float(norm), "lr": rate})
            last = step + 1 == total
            if last or (config.evaluate_every and (step + 1) % config.evaluate_every == 0):
                found = evaluate_rankings(model, validation, pad_id, step + 1)
                history.append(found)
                bar.set_postfix(loss=f"{found.loss:.3f}", accuracy=f"{found.accuracy:.3f}")
                if log:
                    log(
                        step + 1,
                        {
                            "validation_loss": found.loss,
                            "accuracy": found.accuracy,
                            "margin": found.margin,
                            "calibration_error": found.calibration_error,
                        },
                    )
    return tuple(history)


@torch.no_grad()
def evaluate_rankings(
    model: RewardModel, prompts: Sequence[RankedPrompt], pad_id: int, step: int = 0
) -> RankingEvaluation:
    """Loss, accuracy, margin and calibration on rankings."""
    loss, gaps = 0.0, []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        batch = rank_batch([(prompt.completions, prompt.pairs) for prompt in part], pad_id)
        scores = _scores(model, batch)
        loss += float(ranking_loss(scores, batch)) * len(part)
        gaps.append(scores[batch.better.to(scores.device)] - scores[batch.worse.to(scores.device)])
    gap = torch.cat(gaps).double().cpu()
    bins = _reliability(gap)
    error = sum(abs(predicted - seen) * count for predicted, seen, count in bins) / sum(count for *_, count in bins)
    accuracy = float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean())
    return RankingEvaluation(step, loss / len(prompts), accuracy, float(gap.mean()), error, bins)


@torch.no_grad()
def centre_on_demonstrations(model: RewardModel, demonstrations: Sequence[Example], pad_id: int) -> float:
    """Sets the bias so that the mean score of the demonstrations is 0; returns the mean that it took away."""
    mean = float(score_examples(model, demonstrations, pad_id).double().mean())
    model.centre(mean)
    return mean


@torch.no_grad()
def score_examples(
    model: RewardModel, examples: Sequence[Example], pad_id: int, chunk: int = SCORED_TOGETHER
) -> Tensor:
    """Scores of prompts with responses, [len(examples)] float32 on the CPU, in the order given."""
    scores = torch.empty(len(examples))
    for indices in length_batches(lengths_of(examples), chunk):
        batch = pad_sequences([examples[i] for i in indices], pad_id)
        lengths = batch.attention_mask.sum(1)
        scores[indices] = model(batch.ids.to(model.device), lengths.to(model.device)).cpu()
    return scores


def _scores(model: RewardModel, batch: RankedBatch) -> Tensor:
    lengths = batch.batch.attention_mask.sum(1)
    return model.score_rows(batch.batch.ids.to(model.device), lengths.to(model.device))


def _epochs(
    train: Sequence[RankedPrompt], config: RewardConfig, pad_id: int, rng: Random
) -> Iterator[list[tuple[RankedBatch, float]]]:
    """Batches of every epoch, cut into micro-batches, each with its share of the batch's prompts."""
    lengths = lengths_of(train)
    for _ in range(config.epochs):
        for indices in length_batches(lengths, config.batch_size, rng):
            size = config.microbatch or len(indices)
            parts = [indices[at : at + size] for at in range(0, len(indices), size)]
            yield [
                (rank_batch([(train[i].completions, train[i].pairs) for i in part], pad_id), len(part) / len(indices))
                for part in parts
            ]


def _train_step(model: RewardModel, batch: list[tuple[RankedBatch, float]]) -> float:
    loss = 0.0
    for part, share in batch:
        term = ranking_loss(_scores(model, part), part) * share
        term.backward()
        loss += term.item()
    return loss


def _reliability(gap: Tensor) -> tuple[tuple[float, float, int], ...]:
    """Ten bins of the probability given to one of the pair, both orders of every pair counted."""
    probability = torch.cat([gap, -gap]).sigmoid()
    preferred = torch.cat([torch.ones_like(gap), torch.zeros_like(gap)])
    which = (probability * 10).long().clamp(max=9)
    bins = []
    for index in range(10):
        inside = which == index
        if inside.any():
            bins.append((float(probability[inside].mean()), float(preferred[inside].mean()), int(inside.sum())))
    return tuple(bins)
