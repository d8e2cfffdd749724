"""Settings of the reward model."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.schema import Count, Section, WholeNumber


@dataclass(frozen=True)
class RewardConfig(Section):
    """Training of the reward model on rankings."""

    path: str | None = None
    """Folder of a trained reward model, which PPO scores with; it may be smaller than the policy."""
    function: str | None = None
    """Python function in its place, as module:function or file.py:function. It takes a list of prompts and a list of
    answers and gives a list of floats. Answers are texts, and so are prompts, except that a conversation comes as its list of
    messages, each an object with role and content."""
    epochs: Count = 1
    """Passes over the rankings; more than one over-fits (InstructGPT, appendix C.2)."""
    batch_size: Count = 8
    """Prompts of one optimiser step, each with all its completions and pairs."""
    microbatch: WholeNumber = 0
    """Prompts of one forward and backward pass; 0 takes the whole batch at once."""
    evaluate_every: WholeNumber = 0
    """Optimiser steps between validations; 0 validates at the end only."""
    checkpoint_every: WholeNumber | None = None
    """Optimiser steps between checkpoints in OUTPUT_DIR/rm.checkpoint; 0 writes one only where the run ends early. None writes
    one whenever ten minutes have passed since the last, or twenty times as long as that one took."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser of this stage."""

    def check(self) -> None:
        """One reward, not two."""
        if self.path is not None and self.function is not None:
            raise ValueError(f"function: got {self.function!r} beside path {self.path!r}, expected one of the two")
