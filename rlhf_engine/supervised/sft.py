"""Supervised fine-tuning, kept at its validation minimum.

The loss is the negative log-likelihood of the demonstration's tokens, EOS included, and of nothing else; a text without
a prompt counts from its second token on, which makes the same loop pretrain.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random

import torch
from torch import Tensor, nn

from rlhf_engine.config import SFTConfig
from rlhf_engine.data import Example, LanguageBatch, length_batches, lengths_of, pad_sequences
from rlhf_engine.metrics import progress
from rlhf_engine.model import LanguageModel
from rlhf_engine.model.layout import TokenBatch, token_cuts
from rlhf_engine.optim.adamw import OptimizerState, build_optimizer, optimizer_step

Log = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Evaluation:
    """Validation loss at one moment of the training."""

    step: int
    """Optimiser steps done."""
    train_loss: float
    """Mean nats per token over the steps since the evaluation before."""
    validation_loss: float
    """Mean nats per token of the validation set."""


@dataclass(frozen=True)
class FitReport:
    """How a language model's training went."""

    history: tuple[Evaluation, ...]
    """Every evaluation, in order."""
    best: Evaluation
    """The one whose weights the model now has."""
    tokens: int
    """Tokens that carried a loss."""


def batch_logprobs(actor: LanguageModel, batch: LanguageBatch) -> Tensor:  # -> (N,) float32
    """Log-probs of the response tokens of a batch, one row after the other.

    `log pi(a_t | s_t)` for every token under `response_mask` that has a token before it. Rows are padded on the right,
    so a causal trunk needs no attention mask: no token that counts can see a pad.
    """
    taken = batch.response_mask[:, 1:].to(actor.device)
    ids = batch.ids.to(actor.device)
    rows = taken.flatten().nonzero().squeeze(1)
    return actor(TokenBatch(input_ids=ids[:, :-1], rows=rows, ids=ids[:, 1:][taken]), ("logprobs",)).logprobs


def fit_language_model(
    actor: LanguageModel,
    train: Sequence[Example],
    validation: Sequence[Example],
    config: SFTConfig,
    *,
    pad_id: int,
    seed: int,
    optimizer_state: OptimizerState = "resident",
    log: Log | None = None,
    label: str = "sft",
) -> FitReport:
    """Trains until the validation loss has not fallen for `patience` evaluations, then puts the best weights back.

    Raises:
        ValueError: an empty training or validation set.
    """
    _check_sets(train, validation)
    per_epoch = -(-len(train) // config.batch_size)
    total, every = config.epochs * per_epoch, config.evaluate_every or per_epoch
    optimizer = build_optimizer(actor.model, config.optim, optimizer_state)
    minimum, losses, tokens = _Minimum(actor.model, config.patience), [], 0
    with progress(total, label, unit="step") as bar:
        for step, batch in enumerate(_epochs(train, config, pad_id, Random(seed))):
            loss, count = _train_step(actor, batch)
            norm, rate = optimizer_step(optimizer, config.optim, step, total)
            tokens += count
            losses.append(loss)
            bar.update()
            if log:
                log(step + 1, {"loss": loss, "grad_norm": float(norm), "lr": rate})
            if (step + 1) % every and step + 1 < total:
                continue
            found = Evaluation(
                step + 1, sum(losses) / len(losses), evaluate_nll(actor, validation, config.batch_size, pad_id)
            )
            losses.clear()
            bar.set_postfix(train=f"{found.train_loss:.3f}", validation=f"{found.validation_loss:.3f}")
            if log:
                log(step + 1, {"validation_loss": found.validation_loss})
            if minimum.passed(found):
                break
    return FitReport(tuple(minimum.history), minimum.restore(), tokens)


class _Minimum:
    """Remembers the weights at the lowest validation loss."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.patience = patience
        self.history: list[Evaluation] = []
        self.best = -1
        self.weights: list[Tensor] = []

    def passed(self, found: Evaluation) -> bool:
        """Takes note of an evaluation; True when `patience` of them have gone by without a new minimum."""
        self.history.append(found)
        if self.best < 0 or found.validation_loss < self.history[self.best].validation_loss:
            self.best = len(self.history) - 1
            self.weights = [parameter.detach().clone() for parameter in self.trained]
        return len(self.history) - 1 - self.best >= self.patience

    @torch.no_grad()
    def restore(self) -> Evaluation:
        """Puts the best weights back and says where they came from."""
        for parameter, weight in zip(self.trained, self.weights, strict=True):
            parameter.copy_(weight)
        return self.history[self.best]


@torch.no_grad()
def evaluate_nll(actor: LanguageModel, examples: Sequence[Example], batch_size: int, pad_id: int) -> float:
    """Mean negative log-likelihood of the response tokens, in nats per token."""
    total, count = 0.0, 0
    for indices in length_batches(lengths_of(examples), batch_size):
        logprobs = batch_logprobs(actor, pad_sequences([examples[i] for i in indices], pad_id))
        total -= float(logprobs.double().sum())
        count += logprobs.numel()
    return total / count


def _check_sets(train: Sequence[Example], validation: Sequence[Example]) -> None:
    for name, examples in (("train", train), ("validation", validation)):
        if not examples:
            raise ValueError(f"{name}: got no examples, expected at least one")


def _epochs(train: Sequence[Example], config: SFTConfig, pad_id: int, rng: Random) -> Iterator[list[LanguageBatch]]:
    """Batches of every epoch, each already cut into micro-batches."""
    lengths = lengths_of(train)
    for _ in range(config.epochs):
        for indices in length_batches(lengths, config.batch_size, rng):
            yield [pad_sequences([train[i] for i in part], pad_id) for part in _parts(indices, lengths, config)]


def _parts(indices: list[int], lengths: list[int], config: SFTConfig) -> list[list[int]]:
    """A batch, which comes from short to long, in micro-batches; those of a token budget from long to short."""
    if config.microbatch_tokens is None:
        size = config.microbatch or len(indices)
        return [indices[at : at + size] for at in range(0, len(indices), size)]
    rest = indices[::-1]
    # The last token of a row is never an input.
    ends = accumulate(token_cuts([lengths[index] - 1 for index in rest], config.microbatch_tokens))
    return [rest[start:end] for start, end in pairwise([0, *ends])]


def _train_step(actor: LanguageModel, batch: list[LanguageBatch]) -> tuple[float, int]:
    """Backward of `-sum(logprobs) / tokens of the whole batch`; returns that loss and the tokens."""
    count = sum(int(part.response_mask[:, 1:].sum()) for part in batch)
    loss = 0.0
    for part in batch:
        share = -batch_logprobs(actor, part).sum() / count
        share.backward()
        loss += share.item()
    return loss, count
