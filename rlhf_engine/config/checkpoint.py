"""Settings of the checkpoints of all stages."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_engine.config.schema import Count, Section


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Number of checkpoints that `rlhf sft`, `rm` and `ppo` keep; `checkpoint_every` of each stage is the interval."""

    keep: Count = 2
    """Number of checkpoints to keep, the newest included. The earlier ones are in OUTPUT_DIR/checkpoints. If a file of
    the newest is damaged, a resumed run warns and continues from the one before. `rlhf sft` and `rlhf rm` delete them
    when the result is written. On a full disk, earlier checkpoints are deleted to save the newest."""
    best: str | None = None
    """Metric whose best checkpoint is kept too, such as score_mean; with a leading minus the lowest value is the best,
    such as -validation_loss. A checkpoint has the metric's last logged value. If None, only the newest are kept."""

    def check(self) -> None:
        """Raise ValueError for a metric without a name."""
        if self.best is not None and not self.best.removeprefix("-").strip():
            raise ValueError(f"best: got {self.best!r}, expected the name of a metric, such as score_mean")
