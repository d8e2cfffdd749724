"""Settings of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.schema import Count, Section, WholeNumber


@dataclass(frozen=True)
class SFTConfig(Section):
    """Supervised fine-tuning on demonstrations."""

    epochs: Count = 16
    """Most passes over the demonstrations; the run stops at the validation minimum before that."""
    batch_size: Count = 32
    """Demonstrations of one optimiser step."""
    microbatch: WholeNumber = 0
    """Demonstrations of one forward and backward pass; 0 takes the whole batch at once."""
    microbatch_tokens: Count | None = None
    """Tokens of one pass, padding counted, in place of `microbatch` demonstrations; a longer one has a pass of its own."""
    evaluate_every: WholeNumber = 0
    """Optimiser steps between validations; 0 validates after each epoch."""
    patience: Count = 2
    """Validations without a new minimum after which the run stops; the weights of the minimum are kept."""
    checkpoint_every: WholeNumber | None = None
    """Optimiser steps between checkpoints in OUTPUT_DIR/sft.checkpoint; 0 writes one only where the run ends early. None writes
    one whenever ten minutes have passed since the last, or twenty times as long as that one took."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of this stage."""

    def check(self) -> None:
        """One size of a pass, not two."""
        if self.microbatch and self.microbatch_tokens is not None:
            raise ValueError(
                f"microbatch: got {self.microbatch} beside microbatch_tokens {self.microbatch_tokens}, expected one of the two"
            )
