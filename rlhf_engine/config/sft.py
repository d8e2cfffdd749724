"""Settings of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.schema import Count, Section, WholeNumber


@dataclass(frozen=True)
class SFTConfig(Section):
    """Supervised fine-tuning on demonstrations."""

    epochs: Count = 16
    """Maximum passes over the demonstrations; `patience` stops the run earlier, after the minimum of the validation
    loss."""
    turns: Literal["all", "last"] = "all"
    """Turns of the assistant in a conversation that are trained: all of them, or only the response, which is the
    last."""
    batch_size: Count = 32
    """Demonstrations per optimizer step."""
    microbatch: WholeNumber = 0
    """Demonstrations per forward and backward pass; 0 processes the whole batch in one pass."""
    microbatch_tokens: Count | None = None
    """Maximum tokens per forward and backward pass, padding included, instead of `microbatch`. A demonstration with
    more tokens is processed in a separate pass. If None, `microbatch` applies."""
    evaluate_every: WholeNumber = 0
    """Optimizer steps between validations; 0 validates after each epoch."""
    patience: Count = 2
    """Number of consecutive validations without a new minimum of the loss after which the run stops. The weights of the
    minimum are kept."""
    checkpoint_every: WholeNumber | None = None
    """Optimizer steps between checkpoints in OUTPUT_DIR/sft.checkpoint; 0 writes one only if the run ends early. If
    None, the interval is ten minutes, or twenty times the duration of the last checkpoint if that is longer."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer of supervised fine-tuning."""

    def check(self) -> None:
        """Raise ValueError if both limits on a pass are set."""
        if self.microbatch and self.microbatch_tokens is not None:
            raise ValueError(
                f"microbatch is {self.microbatch} and microbatch_tokens is {self.microbatch_tokens}; set only one of the two"
            )
