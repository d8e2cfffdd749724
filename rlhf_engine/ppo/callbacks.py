"""What happens around updates: logging, checkpoints, early stopping.

A callback is an object with any of the methods of `Callback`; the trainer calls them in the order of its list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlhf_engine.metrics import progress

if TYPE_CHECKING:
    from rlhf_engine.ppo.experience import Scored
    from rlhf_engine.ppo.trainer import PPOTrainer


class Callback:
    """Base of a callback: every method does nothing."""

    def on_rollout(self, trainer: PPOTrainer, scored: Scored) -> None:
        """Called with every scored rollout, before the policy learns from it."""

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Called after every update; what it adds to `log` is seen by the callbacks after it."""

    def on_checkpoint(self, trainer: PPOTrainer, folder: Path) -> None:
        """Called after a checkpoint was written."""

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Called when training ends; `error` is what ended it early, None otherwise."""


class Writer(Protocol):
    """Where the numbers of updates go, such as a `MetricsWriter`."""

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the numbers of a step."""


class MetricsLog(Callback):
    """Write the numbers of every update with `writer`, and show a progress bar where stderr is a terminal."""

    def __init__(self, writer: Writer, *, extra: Callable[[], dict[str, float]] = dict) -> None:
        self.writer, self.extra, self.bar = writer, extra, None
        self.history: list[dict[str, float]] = []

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Write one line."""
        log |= self.extra()
        self.writer.write(trainer.updates_done, log)
        self.history.append(log)
        if self.bar is None:
            self.bar = progress(trainer.config.updates, "ppo", unit="update", done=trainer.updates_done - 1)
        self.bar.update()
        self.bar.set_postfix(score=f"{log['score_mean']:.2f}", kl=f"{log['kl']:.2f}")

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()


class Checkpoints(Callback):
    """Call `save(trainer)`, which returns the folder written, every `every` updates (0: never) and at the end.

    An error that ends a run between two updates saves those that are done. After an error within an update that had changed a
    weight nothing is saved: no run could have reached that state.
    """

    def __init__(self, save: Callable[[PPOTrainer], Path], every: int = 0) -> None:
        self.save, self.every, self.saved = save, every, -1

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Save where the number of updates says so."""
        if self.every and trainer.updates_done % self.every == 0:
            self._save(trainer)

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Save the updates that are done."""
        if trainer.whole and trainer.updates_done > max(self.saved, trainer.resumed_at):
            self._save(trainer)

    def _save(self, trainer: PPOTrainer) -> None:
        folder = self.save(trainer)
        self.saved = trainer.updates_done
        trainer.notify("on_checkpoint", folder)


class EarlyStopping(Callback):
    """End training once a number of the log was outside its bounds in `updates` consecutive updates."""

    def __init__(self, name: str, *, above: float = math.inf, below: float = -math.inf, updates: int = 1) -> None:
        if above == math.inf and below == -math.inf:
            raise ValueError("above, below: got neither bound, expected one or both")
        self.name, self.above, self.below, self.updates, self.count = name, above, below, updates, 0

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Count the updates outside the bounds."""
        if self.name not in log:
            raise ValueError(f"name: got {self.name!r}, expected a number of the log: {', '.join(sorted(log))}")
        outside = not self.below <= log[self.name] <= self.above
        self.count = self.count + 1 if outside else 0
        if self.count >= self.updates:
            trainer.stop()
