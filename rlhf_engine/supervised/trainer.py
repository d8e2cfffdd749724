"""Base class of the trainers of fine-tuning and the reward model: optimizer steps, evaluations, and their state.

A run is a function of its seed, its data and its settings. The order of the batches is a function of the seed and the epoch, so
a checkpoint needs no position but the number of finished steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_engine.config import RewardConfig, SFTConfig
from rlhf_engine.data import length_batches, lengths_of
from rlhf_engine.distributed.ranks import ONE, Ranks
from rlhf_engine.files import OPTIMIZER
from rlhf_engine.memory.passes import MicrobatchSize, Passes
from rlhf_engine.model.saving import copy_tensors
from rlhf_engine.optim.adamw import Schedule, optimizer_step
from rlhf_engine.optim.build import OptimizerState, build_optimizer
from rlhf_engine.optim.state_dict import load_optimizer_tensors, optimizer_tensors
from rlhf_engine.progress import Bar, progress

Log = Callable[[int, dict[str, float]], None]
Evaluated = TypeVar("Evaluated")


def _nothing() -> None:
    pass


class SupervisedTrainer(ABC, Generic[Evaluated]):
    """Optimizer steps over shuffled batches of similar lengths, with an evaluation every `evaluate_every` steps and at the end.

    It implements `rlhf_engine.checkpoint.Checkpointable`. A subclass defines the loss, the evaluation and their state.
    """

    stage: str
    unit = "step"

    def __init__(
        self,
        model: nn.Module,
        train: Sequence[Sized],
        config: SFTConfig | RewardConfig,
        *,
        seed: int,
        evaluate_every: int,
        optimizer_state: OptimizerState,
        log: Log | None,
        label: str,
        ranks: Ranks = ONE,
    ) -> None:
        self.ranks = ranks
        self.model, self.config, self.seed, self.label = model, config, seed, label
        self.lengths = lengths_of(train)
        self.per_epoch = -(-len(train) // config.batch_size)
        self.total = config.epochs * self.per_epoch
        self.schedule = Schedule(config.optim, self.total)
        self.evaluate_every = evaluate_every or self.total
        self.step_metrics: dict[str, float] = {}
        """Further metrics of the last step."""
        self.log = log or (lambda step, metrics: None)
        self.optimizer = build_optimizer(model, config.optim, optimizer_state)
        self.optimizer.register_step_pre_hook(self._changes)
        size = MicrobatchSize(
            microbatch=config.microbatch or config.batch_size,
            microbatch_tokens=config.microbatch_tokens if isinstance(config, SFTConfig) else None,
        )
        self.passes = Passes(size, "sft" if isinstance(config, SFTConfig) else "reward", ranks)
        self.done = 0
        self.whole = True

    # ---- methods of a subclass ----

    @abstractmethod
    def backward(self, ours: list[int], size: MicrobatchSize, *, share: float = 1.0) -> float:
        """Add the gradients of the records number `ours`, in passes of `size`; return their part of the batch's loss.

        They are the given `share` of the records of the batch, which several ranks compute together.
        """

    @abstractmethod
    def stepped(self, loss: float) -> None:
        """Update the state after a finished step."""

    @abstractmethod
    def evaluate(self) -> Evaluated:
        """Evaluate the model after `done` steps, without changing any state."""

    @abstractmethod
    def keep(self, found: Evaluated, bar: Bar) -> dict[str, float]:
        """Add an evaluation to the state, show it in the progress bar, and return the metrics to log."""

    @property
    @abstractmethod
    def last_evaluation(self) -> int:
        """Number of finished steps at the last evaluation; 0 before the first."""

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.done == self.total

    @abstractmethod
    def saved_tensors(self, folder: Path) -> Mapping[str, Tensor]:
        """Return the tensors in a folder that `write_model` wrote, by the names of `weights`."""

    # ---- the run ----

    def train(
        self,
        on_step: Callable[[], object] = _nothing,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Train until no step is left.

        `on_step` is called after each finished step and its evaluation, if one is due. An evaluation runs inside
        `interruptible()`. An interrupted evaluation loses no state, because a resumed run begins with it.
        """
        batches = islice(self._batches(), self.done, None)
        with progress(self.total, self.label, unit="step", done=self.done, hidden=not self.ranks.first) as bar:
            while self._evaluation_due or not self.finished:
                if not self._evaluation_due:
                    batch = next(batches)
                    self._step(batch)
                    bar.advance(tokens=sum(self.lengths[index] for index in batch))
                if self._evaluation_due:
                    with interruptible():
                        found = self.evaluate()
                    self.log(self.done, self.keep(found, bar))
                on_step()

    def _batches(self) -> Iterator[list[int]]:
        order = Random(self.seed)
        for _ in range(self.config.epochs):
            yield from length_batches(self.lengths, self.config.batch_size, order)

    def _step(self, indices: list[int]) -> None:
        before = self.done
        try:
            loss = self._batch_backward(indices)
            norm, rate = optimizer_step(self.optimizer, self.config.optim, self.done, self.schedule)
            self.done += 1
            self.stepped(loss)
            self.whole = True
        finally:
            if self.done == before:
                self._drop_gradient()
        self.log(self.done, {"loss": loss, "grad_norm": float(norm), "lr": rate, **self.step_metrics})

    def _batch_backward(self, indices: list[int]) -> float:
        """Compute the gradient of a batch, of which each rank computes its share; return the loss."""
        dealt = self.ranks.shares(torch.as_tensor(self.lengths[indices]))
        ours = [indices[row] for row in dealt[self.ranks.rank].tolist()]
        # A rank without records computes a gradient of zeros, because the sum has a term of each rank.
        share, ours = len(ours) / len(indices), ours or indices[:1]
        part = self.passes.fitting(lambda size: self.backward(ours, size, share=share), undo=self._drop_gradient)
        self.ranks.sum_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        return sum(self.ranks.each(part))

    @property
    def _evaluation_due(self) -> bool:
        due = self.done == self.total or self.done % self.evaluate_every == 0
        return due and self.last_evaluation < self.done

    def _changes(self, *_: object) -> None:
        self.whole = False

    def _drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Return the numbers that a resumed run needs."""
        return {"done": self.done} | self.passes.state()

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state by name."""
        return optimizer_tensors(self.optimizer)

    def gathered(self, folder: Path) -> AbstractContextManager[None]:
        """Do nothing: every rank has whole tensors."""
        return nullcontext()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the model's tensors that a checkpoint holds."""
        return self.model.named_parameters()

    def constants(self) -> Mapping[str, str]:
        """Return no constants: training does not use the initial model after the first step."""
        return {}

    @abstractmethod
    def write_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, complete: bool = False) -> None:
        """Write the model after `done` steps: with `complete` as a result, otherwise without layers that are frozen."""

    def load(self, folder: Path, state: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Load a checkpoint.

        Raises:
            ValueError: with the name of a file that does not fit.
        """
        copy_tensors(folder, self.saved_tensors(folder), self.weights())
        load_optimizer_tensors(self.optimizer, tensors, folder / OPTIMIZER)
        self.done = state["done"]
        self.passes.load_state(state)
