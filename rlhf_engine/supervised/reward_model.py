"""Training of a reward model on rankings. Every completion passes through the model once, however many pairs it is in.

Legend: B completions, P pairs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

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
from rlhf_engine.distributed.ranks import ONE, Ranks
from rlhf_engine.memory.passes import MicrobatchSize
from rlhf_engine.model.pretrained import write_pretrained
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.optim.build import OptimizerState
from rlhf_engine.progress import Bar
from rlhf_engine.supervised.trainer import Log, SupervisedTrainer

_SCORED_ROWS, _SCORED_TOKENS = 64, 8192
"""Maximum number of sequences, and of tokens with padding, in one forward pass of `score_examples`."""


@dataclass(frozen=True)
class RankedPrompt:
    """The tokenized completions of one prompt, and the pairs of its ranking."""

    completions: tuple[Example, ...]
    """The K completions."""
    pairs: tuple[tuple[int, int], ...]
    """(better, worse) indices of all pairs that are not tied."""

    def __len__(self) -> int:
        """Return the number of tokens of the longest completion with its prompt."""
        return max(map(len, self.completions))


def _encode(ranked: RankedPrompt) -> list[int]:
    rows = [EXAMPLES.encode(completion) for completion in ranked.completions]
    return [len(rows), *map(len, rows), *chain(*rows, *ranked.pairs)]


def _decode(row: NDArray[np.int32]) -> RankedPrompt:
    count = int(row[0])
    *rows, pairs = np.split(row[1 + count :], np.cumsum(row[1 : 1 + count]))
    return RankedPrompt(
        tuple(map(EXAMPLES.decode, rows)), tuple((better, worse) for better, worse in pairs.reshape(-1, 2).tolist())
    )


RANKED_PROMPTS: RecordCodec[RankedPrompt] = RecordCodec(_encode, _decode)
"""Codec of prompts with their completions and pairs."""


@dataclass(frozen=True)
class RankingEvaluation:
    """Metrics of a reward model on held-out rankings."""

    step: int
    """Number of optimizer steps done."""
    loss: float
    """Mean of the K-way loss over prompts, in nats per pair."""
    accuracy: float
    """Share of untied pairs that the model orders like the labeler; equal scores count half."""
    margin: float
    """Mean of `r_better - r_worse` over untied pairs."""
    calibration_error: float
    """Mean gap between `sigmoid(r_1 - r_2)` and the share of pairs where 1 was preferred, over ten equal bins."""
    bins: tuple[tuple[float, float, int], ...]
    """(mean predicted probability, share preferred, number of pairs) of each bin that has pairs."""

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """Return the evaluation from its JSON object, in which tuples are lists."""
        fields: dict[str, Any] = found | {"bins": tuple((low, high, count) for low, high, count in found["bins"])}
        return cls(**fields)


def encode_comparison(comparison: Comparison, codec: Codec) -> RankedPrompt | None:
    """Tokenize a comparison; return None if all its completions are tied, because it then has no pairs to train on."""
    pairs = comparison.pairs()
    if not pairs:
        return None
    prompt = codec.encode_prompt(comparison.prompt)
    answers = tuple(codec.join(prompt, text) for text in comparison.completions)
    return RankedPrompt(answers, tuple(pairs))


def ranking_loss(scores: Tensor, batch: RankedBatch) -> Tensor:
    """Return the K-way ranking loss (Ouyang et al. 2022, equation 1): the mean over prompts of the mean over pairs.

        loss = -1 / prompts * sum_prompts 1 / pairs(prompt) * sum_pairs log sigmoid(r_better - r_worse)

    `scores` is [B] float32. All pairs of a prompt are one batch element; tied pairs do not count.
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
    """Train for `config.epochs` and return all evaluations on the held-out rankings; the last one is of the final model.

    Raises:
        ValueError: for an empty training or validation set.
    """
    trainer = RewardTrainer(
        model, train, validation, config, pad_id=pad_id, seed=seed, optimizer_state=optimizer_state, log=log
    )
    trainer.train()
    return tuple(trainer.history)


class RewardTrainer(SupervisedTrainer[RankingEvaluation]):
    """Trainer of a reward model; `history` holds all evaluations. It can be saved and resumed after any step."""

    stage = "rm"
    model: RewardModel
    config: RewardConfig

    def __init__(
        self,
        model: RewardModel,
        train: Sequence[RankedPrompt],
        validation: Sequence[RankedPrompt],
        config: RewardConfig,
        *,
        pad_id: int,
        seed: int,
        optimizer_state: OptimizerState = "resident",
        log: Log | None = None,
        ranks: Ranks = ONE,
    ) -> None:
        for name, prompts in (("train", train), ("validation", validation)):
            if not prompts:
                raise ValueError(f"{name}: no ranking has an untied pair, expected at least one")
        super().__init__(
            model,
            train,
            config,
            seed=seed,
            evaluate_every=config.evaluate_every,
            optimizer_state=optimizer_state,
            log=log,
            label="reward model",
            ranks=ranks,
        )
        self.prompts, self.validation, self.pad_id = train, validation, pad_id
        self.history: list[RankingEvaluation] = []

    @property
    def last_evaluation(self) -> int:
        """Number of finished steps at the last evaluation; 0 before the first."""
        return self.history[-1].step if self.history else 0

    def backward(self, ours: list[int], size: MicrobatchSize, *, share: float = 1.0) -> float:
        """Add the gradients of a batch, each micro-batch weighted by its share of the prompts; return the loss."""
        rankings, loss = size["microbatch"], 0.0
        for at in range(0, len(ours), rankings):
            part = [self.prompts[i] for i in ours[at : at + rankings]]
            batch = rank_batch([(prompt.completions, prompt.pairs) for prompt in part], self.pad_id)
            term = ranking_loss(_scores(self.model, batch), batch) * (len(part) / len(ours) * share)
            term.backward()
            loss += term.item()
        return loss

    def stepped(self, loss: float) -> None:
        """Do nothing: the state of this trainer has no values per step."""

    def evaluate(self) -> RankingEvaluation:
        """Evaluate the model on the held-out rankings."""
        return evaluate_rankings(self.model, self.validation, self.pad_id, self.done, self.ranks)

    def keep(self, found: RankingEvaluation, bar: Bar) -> dict[str, float]:
        """Record an evaluation."""
        self.history.append(found)
        bar.show(loss=f"{found.loss:.3f}", accuracy=f"{found.accuracy:.3f}")
        return {
            "validation_loss": found.loss,
            "accuracy": found.accuracy,
            "margin": found.margin,
            "calibration_error": found.calibration_error,
        }

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Return the counter and all evaluations."""
        return super().state() | {"history": [asdict(found) for found in self.history]}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the model's tensors that a checkpoint holds."""
        return self.model.stored()

    def write_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, complete: bool = False) -> None:
        """Write the current model in the format of `RewardModel.load`.

        Unless `complete`, frozen layers below the trained ones are left out.
        """
        self.model.save(folder, complete=complete)
        write_pretrained(folder, None, tokenizer)

    def saved_tensors(self, folder: Path) -> Mapping[str, Tensor]:
        """Return the tensors in a folder that `write_model` wrote, by the names of `weights`."""
        return self.model.saved_tensors(folder)

    def load(self, folder: Path, state: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Load a checkpoint.

        Raises:
            ValueError: with the name of a file that does not fit.
        """
        super().load(folder, state, tensors)
        self.history = [RankingEvaluation.from_json(found) for found in state["history"]]


@torch.no_grad()
def evaluate_rankings(
    model: RewardModel, prompts: Sequence[RankedPrompt], pad_id: int, step: int = 0, ranks: Ranks = ONE
) -> RankingEvaluation:
    """Compute the loss, accuracy, margin and calibration of a reward model on rankings; ranks score parts in turn."""
    loss, gaps = 0.0, [torch.empty(0)]
    for start in range(ranks.rank * 16, len(prompts), ranks.size * 16):
        part = prompts[start : start + 16]
        batch = rank_batch([(prompt.completions, prompt.pairs) for prompt in part], pad_id)
        scores = _scores(model, batch)
        loss += float(ranking_loss(scores, batch)) * len(part)
        gaps.append((scores[batch.better.to(scores.device)] - scores[batch.worse.to(scores.device)]).cpu())
    every = ranks.each((loss, torch.cat(gaps)))
    loss, gap = sum(part for part, _ in every), torch.cat([part for _, part in every]).double()
    bins = _reliability(gap)
    error = sum(abs(predicted - seen) * count for predicted, seen, count in bins) / sum(count for *_, count in bins)
    accuracy = float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean())
    return RankingEvaluation(step, loss / len(prompts), accuracy, float(gap.mean()), error, bins)


@torch.no_grad()
def centre_on_demonstrations(model: RewardModel, demonstrations: Sequence[Example], pad_id: int) -> float:
    """Set the bias so that the mean score of the demonstrations is 0; return the mean that was subtracted."""
    mean = float(score_examples(model, demonstrations, pad_id).double().mean())
    model.centre(mean)
    return mean


def rows_scored_together(longest: int) -> int:
    """Return the number of sequences in one forward pass of `score_examples`, of which the longest has `longest` tokens."""
    return max(1, min(_SCORED_ROWS, _SCORED_TOKENS // longest))


@torch.no_grad()
def score_examples(model: RewardModel, examples: Sequence[Example], pad_id: int) -> Tensor:
    """Return the scores of prompts with responses, [len(examples)] float32 on the CPU, in the order of `examples`."""
    scores, lengths = torch.empty(len(examples)), lengths_of(examples)
    for similar in length_batches(lengths, _SCORED_ROWS):
        count = rows_scored_together(int(lengths[similar].max()))
        for start in range(0, len(similar), count):
            indices = similar[start : start + count]
            batch = pad_sequences([examples[i] for i in indices], pad_id)
            sizes = batch.attention_mask.sum(1)
            scores[indices] = model(batch.ids.to(model.device), sizes.to(model.device)).cpu()
    return scores


def _scores(model: RewardModel, batch: RankedBatch) -> Tensor:
    lengths = batch.batch.attention_mask.sum(1)
    return model.score_rows(batch.batch.ids.to(model.device), lengths.to(model.device))


def _reliability(gap: Tensor) -> tuple[tuple[float, float, int], ...]:
    """Return the bins of the predicted probability that the first of a pair is preferred; both orders of a pair count."""
    probability = torch.cat([gap, -gap]).sigmoid()
    preferred = torch.cat([torch.ones_like(gap), torch.zeros_like(gap)])
    which = (probability * 10).long().clamp(max=9)
    bins = []
    for index in range(10):
        inside = which == index
        if inside.any():
            bins.append((float(probability[inside].mean()), float(preferred[inside].mean()), int(inside.sum())))
    return tuple(bins)
