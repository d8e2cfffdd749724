"""What fine-tuning and the reward model share: optimizer steps in an order that the seed fixes, evaluations, and their state.

A run is a function of its seed, its data and its settings. The order of the batches is a function of the seed and the epoch, so
the number of finished steps is the only position that a checkpoint needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhf_engine.config import RewardConfig, SFTConfig
from rlhf_engine.data import length_batches, lengths_of
from rlhf_engine.files import OPTIMIZER
from rlhf_engine.metrics import progress
from rlhf_engine.model.saving import copy_parameters
from rlhf_engine.optim.adamw import optimizer_step
from rlhf_engine.optim.build import OptimizerState, build_optimizer
from rlhf_engine.optim.state_dict import load_optimizer_tensors, optimizer_tensors

Log = Callable[[int, dict[str, float]], None]
Evaluated = TypeVar("Evaluated")


def _nothing() -> None:
    pass


class SupervisedTrainer(ABC, Generic[Evaluated]):
    """Optimizer steps over shuffled batches of like length, with an evaluation every so many steps and after the last one.

    Follows `rlhf_engine.checkpoint.Checkpointable`. A subclass defines the loss, the evaluation and what it keeps of them.
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
    ) -> None:
        self.model, self.config, self.seed, self.label = model, config, seed, label
        self.lengths = lengths_of(train)
        self.per_epoch = -(-len(train) // config.batch_size)
        self.total = config.epochs * self.per_epoch
        self.evaluate_every = evaluate_every or self.total
        self.log = log or (lambda step, metrics: None)
        self.optimizer = build_optimizer(model, config.optim, optimizer_state)
        self.optimizer.register_step_pre_hook(self._changes)
        self.done = 0
        self.whole = True

    # ---- what a subclass defines ----

    @abstractmethod
    def backward(self, indices: list[int]) -> float:
        """Add the gradients of a batch, which is given by the numbers of its records; return its loss."""

    @abstractmethod
    def stepped(self, loss: float) -> None:
        """Keep what a finished step adds to the state."""

    @abstractmethod
    def evaluate(self) -> Evaluated:
        """Evaluate the model after `done` steps and change nothing."""

    @abstractmethod
    def keep(self, found: Evaluated, bar: tqdm) -> dict[str, float]:
        """Add an evaluation to the state, show it in the bar and return what the log gets."""

    @property
    @abstractmethod
    def last_evaluation(self) -> int:
        """Steps that were finished at the last evaluation; 0 before the first."""

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.done == self.total

    @abstractmethod
    def read_model(self, folder: Path) -> nn.Module:
        """Return the model in a folder that `write_model` wrote, with the dtype and the device of this one."""

    # ---- the run ----

    def train(
        self,
        on_step: Callable[[], object] = _nothing,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Run to the end.

        `on_step` follows each finished step and its evaluation, if one is due. An evaluation runs in `interruptible()`: it can
        be interrupted without a loss, since a resumed run begins with it.
        """
        batches = islice(self._batches(), self.done, None)
        with progress(self.total, self.label, unit="step", done=self.done) as bar:
            while self._evaluation_due or not self.finished:
                if not self._evaluation_due:
                    self._step(next(batches))
                    bar.update()
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
            loss = self.backward(indices)
            norm, rate = optimizer_step(self.optimizer, self.config.optim, self.done, self.total)
            self.done += 1
            self.stepped(loss)
            self.whole = True
        finally:
            if self.done == before:
                self.optimizer.zero_grad(set_to_none=True)
        self.log(self.done, {"loss": loss, "grad_norm": float(norm), "lr": rate})

    @property
    def _evaluation_due(self) -> bool:
        due = self.done == self.total or self.done % self.evaluate_every == 0
        return due and self.last_evaluation < self.done

    def _changes(self, *_: object) -> None:
        self.whole = False

    # ---- checkpoints ----

    def state(self) -> dict[str, Any]:
        """Return the numbers that a resumed run needs."""
        return {"done": self.done}

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state by name."""
        return optimizer_tensors(self.optimizer)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the model's tensors."""
        return self.model.named_parameters()

    def constants(self) -> Mapping[str, Any]:
        """Return nothing: the model that training began with leaves no trace but the weights."""
        return {}

    @abstractmethod
    def write_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the model as it is after `done` steps."""

    def load(self, folder: Path, state: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue from a checkpoint; ValueError naming the file that does not fit."""
        copy_parameters(folder, self.read_model(folder), self.model)
        load_optimizer_tensors(self.optimizer, tensors, folder / OPTIMIZER)
        self.done = state["done"]
