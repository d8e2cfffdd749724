"""Supervised fine-tuning, which returns the weights of the lowest validation loss.

The loss is the negative log-likelihood of the response tokens of a demonstration, EOS included. A text without a prompt counts
from its second token on, so the same loop also pretrains.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_engine.config import SFTConfig
from rlhf_engine.data import Example, LanguageBatch, length_batches, lengths_of, pad_sequences
from rlhf_engine.distributed.ranks import ONE, Ranks
from rlhf_engine.files import OPTIMIZER
from rlhf_engine.memory.passes import MicrobatchSize
from rlhf_engine.model import LanguageModel
from rlhf_engine.model.layout import TokenBatch, token_cuts
from rlhf_engine.model.roles import Outputs, Want
from rlhf_engine.model.saving import save_language_model, saved_tensors
from rlhf_engine.optim.build import OptimizerState
from rlhf_engine.progress import Bar
from rlhf_engine.supervised.trainer import Log, SupervisedTrainer


@dataclass(frozen=True)
class Evaluation:
    """Losses at one step of the training."""

    step: int
    """Number of optimizer steps done."""
    train_loss: float
    """Mean nats per token over the steps since the previous evaluation."""
    validation_loss: float
    """Mean nats per token of the validation set."""


@dataclass(frozen=True)
class FitReport:
    """Result of a language model's training."""

    history: tuple[Evaluation, ...]
    """All evaluations, in order."""
    best: Evaluation
    """Evaluation with the lowest validation loss, whose weights the model now has."""
    tokens: int
    """Number of tokens in the losses of all steps."""

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """Return the report from its JSON object."""
        history = tuple(Evaluation(**one) for one in found["history"])
        return cls(history, Evaluation(**found["best"]), found["tokens"])


def batch_logprobs(actor: LanguageModel, batch: LanguageBatch) -> Tensor:  # -> (N,) float32
    """Return the log-probs of the response tokens of a batch, concatenated row by row.

    They are `log pi(a_t | s_t)` for every token in `response_mask` that has a token before it. Rows are padded on the right, so
    a causal trunk needs no attention mask: response tokens never attend to padding.
    """
    logprobs = batch_outputs(actor, batch, ("logprobs",)).logprobs
    assert logprobs is not None
    return logprobs


def batch_outputs(actor: LanguageModel, batch: LanguageBatch, want: tuple[Want, ...]) -> Outputs:
    """Return the outputs `want` of a batch, with log-probs as those of `batch_logprobs`.

    For the balancing loss the trunk also reads the last token of each row, as transformers does.
    """
    width = batch.ids.shape[1] - ("balance" not in want)
    taken = batch.response_mask[:, 1:].to(actor.device)
    ids, real = batch.ids.to(actor.device), batch.attention_mask.to(actor.device)
    row, column = taken.nonzero(as_tuple=True)
    inputs = TokenBatch(
        input_ids=ids[:, :width], rows=row * width + column, ids=ids[:, 1:][taken], real=real[:, :width]
    )
    return actor(inputs, want)


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
    """Train until the validation loss has no new minimum for `patience` evaluations, then restore the best weights.

    Raises:
        ValueError: for an empty training or validation set.
    """
    trainer = SFTTrainer(
        actor,
        train,
        validation,
        config,
        pad_id=pad_id,
        seed=seed,
        optimizer_state=optimizer_state,
        log=log,
        label=label,
    )
    trainer.train()
    return trainer.finish()


class SFTTrainer(SupervisedTrainer[Evaluation]):
    """Trainer for fine-tuning a language model: call `train()`, then `finish()`. It can be saved and resumed after any step."""

    stage = "sft"
    model: PreTrainedModel
    config: SFTConfig

    def __init__(
        self,
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
        ranks: Ranks = ONE,
    ) -> None:
        _check_sets(train, validation)
        super().__init__(
            actor.model,
            train,
            config,
            seed=seed,
            evaluate_every=config.evaluate_every or -(-len(train) // config.batch_size),
            optimizer_state=optimizer_state,
            log=log,
            label=label,
            ranks=ranks,
        )
        self.actor, self.examples, self.validation, self.pad_id = actor, train, validation, pad_id
        self.minimum = _Minimum(actor.model, config.patience)
        self.losses: list[float] = []
        self.tokens = 0
        self._tokens_of_step = 0

    def finish(self) -> FitReport:
        """Restore the weights of the lowest validation loss and return the report."""
        return FitReport(tuple(self.minimum.history), self.minimum.restore(), self.tokens)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the last `patience` evaluations had no new minimum."""
        return super().finished or self.minimum.passed

    @property
    def last_evaluation(self) -> int:
        """Number of finished steps at the last evaluation; 0 before the first."""
        return self.minimum.history[-1].step if self.minimum.history else 0

    def backward(self, ours: list[int], size: MicrobatchSize, *, share: float = 1.0) -> float:
        """Add the gradients of `-sum(logprobs) / response tokens of the whole batch`; return that loss."""
        parts = _parts(ours, self.lengths, size)
        batch = [pad_sequences([self.examples[i] for i in part], self.pad_id) for part in parts]
        weight = 1.0 if share else 0.0
        tokens = sum(int(part.response_mask[:, 1:].sum()) for part in batch) if share else 0
        self._tokens_of_step = sum(self.ranks.each(tokens))
        loss, balance = 0.0, 0.0
        wants: tuple[Want, ...] = ("logprobs",) if self.actor.balance is None else ("logprobs", "balance")
        for part in batch:
            outputs = batch_outputs(self.actor, part, wants)
            assert outputs.logprobs is not None
            term = total = -outputs.logprobs.sum() * weight / self._tokens_of_step
            if outputs.balance is not None:  # a mean over the micro-batches
                total = term + outputs.balance * (weight * len(outputs.logprobs) / self._tokens_of_step)
            total.backward()
            loss += term.item()
            balance += float(total.detach() - term.detach())
        if self.actor.balance is not None:
            self.step_metrics = {"router_aux_loss": sum(self.ranks.each(balance))}
        return loss

    def stepped(self, loss: float) -> None:
        """Record the loss for the mean of the next evaluation, and count the tokens."""
        self.losses.append(loss)
        self.tokens += self._tokens_of_step

    def evaluate(self) -> Evaluation:
        """Compute the validation loss."""
        validation_loss = evaluate_nll(self.actor, self.validation, self.config.batch_size, self.pad_id, self.ranks)
        return Evaluation(self.done, sum(self.losses) / len(self.losses), validation_loss)

    def keep(self, found: Evaluation, bar: Bar) -> dict[str, float]:
        """Record an evaluation, and copy the weights if it is a new minimum."""
        self.minimum.add(found)
        self.losses.clear()
        bar.show(train=f"{found.train_loss:.3f}", validation=f"{found.validation_loss:.3f}")
        return {"validation_loss": found.validation_loss}

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Return the counters, the losses since the last evaluation, and all evaluations."""
        history = [[one.step, one.train_loss, one.validation_loss] for one in self.minimum.history]
        return super().state() | {
            "tokens": self.tokens,
            "losses": list(self.losses),
            "history": history,
            "best": self.minimum.best,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state and the weights of the lowest validation loss so far."""
        best = {f"{_BEST}{name}": weight for name, weight in self.minimum.weights.items()}
        return super().tensors() | best

    def write_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, complete: bool = False) -> None:
        """Write the current model in the format of `AutoModelForCausalLM`, or the adapter in that of peft.

        Unless `complete`, frozen layers below the trained ones are left out.
        """
        save_language_model(folder, self.actor, tokenizer, complete=complete)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the model's tensors that a checkpoint holds."""
        return self.actor.stored()

    def saved_tensors(self, folder: Path) -> Mapping[str, Tensor]:
        """Return the tensors in a folder that `write_model` wrote, by the names of `weights`."""
        return saved_tensors(folder, self.actor)

    def load(self, folder: Path, state: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Load a checkpoint.

        Raises:
            ValueError: with the name of a file that does not fit.
        """
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BEST)}
        super().load(folder, state, rest)
        history = [Evaluation(*found) for found in state["history"]]
        weights = {name.removeprefix(_BEST): tensor for name, tensor in tensors.items() if name not in rest}
        self.minimum.load(history, state["best"], weights, folder / OPTIMIZER)
        self.tokens, self.losses = state["tokens"], list(state["losses"])


_BEST = "best."
"""Prefix in a checkpoint of the names of the weights at the minimum."""


class _Minimum:
    """The evaluations so far, and a copy of the weights at the lowest validation loss."""

    def __init__(self, model: nn.Module, patience: int) -> None:
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.patience = patience
        self.history: list[Evaluation] = []
        self.best = -1
        self.weights: dict[str, Tensor] = {}

    def add(self, found: Evaluation) -> None:
        """Append an evaluation, and copy the weights if its validation loss is the lowest."""
        if self.best < 0 or found.validation_loss < self.history[self.best].validation_loss:
            self.best = len(self.history)
            self.weights = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        self.history.append(found)

    @property
    def passed(self) -> bool:
        """Whether the last `patience` evaluations had no new minimum."""
        return bool(self.history) and len(self.history) - 1 - self.best >= self.patience

    @torch.no_grad()
    def restore(self) -> Evaluation:
        """Restore the best weights and return their evaluation."""
        for name, parameter in self.trained.items():
            parameter.copy_(self.weights[name])
        return self.history[self.best]

    def load(self, history: list[Evaluation], best: int, weights: dict[str, Tensor], source: Path) -> None:
        """Restore the state from a checkpoint; raise ValueError with the name of the first weight that does not fit."""
        expected = {name: parameter.shape for name, parameter in self.trained.items()} if best >= 0 else {}
        found = {name: weight.shape for name, weight in weights.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(f"{source}: got {found.get(name)} for {_BEST}{name}, expected {expected.get(name)}")
        if not -1 <= best < len(history) or (best < 0) != (not history):
            raise ValueError(f"{source.parent}: got {best} as the index of the best of {len(history)} evaluations")
        self.history, self.best = history, best
        self.weights = {name: weight.to(self.trained[name]) for name, weight in weights.items()}


@torch.no_grad()
def evaluate_nll(
    actor: LanguageModel, examples: Sequence[Example], batch_size: int, pad_id: int, ranks: Ranks = ONE
) -> float:
    """Return the mean negative log-likelihood of the response tokens, in nats per token; ranks compute batches in turn."""
    total, count = 0.0, 0
    batches = list(length_batches(lengths_of(examples), batch_size))
    for indices in batches[ranks.rank :: ranks.size]:
        logprobs = batch_logprobs(actor, pad_sequences([examples[i] for i in indices], pad_id))
        total -= float(logprobs.double().sum())
        count += logprobs.numel()
    every = ranks.each((total, count))
    return sum(total for total, _ in every) / sum(count for _, count in every)


def _check_sets(train: Sequence[Example], validation: Sequence[Example]) -> None:
    for name, examples in (("train", train), ("validation", validation)):
        if not examples:
            raise ValueError(f"{name}: the set of examples is empty, expected at least one")


def _parts(indices: list[int], lengths: NDArray[np.int64], size: MicrobatchSize) -> list[list[int]]:
    """Split a batch, sorted from short to long, into micro-batches. With a token budget the longest sequences come first."""
    tokens, rows = size["microbatch_tokens"], size["microbatch"]
    if tokens is None:
        return [indices[at : at + rows] for at in range(0, len(indices), rows)]
    rest = indices[::-1]
    # The last token of a row is never an input.
    ends = accumulate(token_cuts([lengths[index] - 1 for index in rest], tokens))
    return [rest[start:end] for start, end in pairwise([0, *ends])]
