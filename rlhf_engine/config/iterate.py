"""Settings of `rlhf iterate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Count, Section


@dataclass(frozen=True)
class IterateConfig(Section):
    """Rounds of generate, rank, reward model, PPO (`rlhf iterate`)."""

    rounds: Count = 2
    """How many rounds; a finished run goes on when this grows."""
    start: Literal["previous", "sft"] = "previous"
    """Model that a round's PPO starts from, and that its KL is measured to: the policy of the round before, or model.path."""
    judge: str | None = None
    """Who ranks the new answers: a judge as in `eval.judge`, or `file` to wait for somebody's rankings."""
    prompts: Count = 64
    """Prompts of the training split that are answered and ranked in a round, other ones in each."""
    completions: Count = 4
    """Answers to each of them; identical and empty ones are left out."""

    def check(self) -> None:
        """A ranking has at least two places."""
        if self.completions < 2:
            raise ValueError(f"completions: got {self.completions}, expected at least 2 to compare")
