"""Settings of `rlhf iterate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Count, Section


@dataclass(frozen=True)
class IterateConfig(Section):
    """Rounds of generate, rank, reward model, PPO (`rlhf iterate`)."""

    rounds: Count = 2
    """Number of rounds. A finished run continues when this is raised."""
    start: Literal["previous", "sft"] = "previous"
    """Model that PPO starts from in each round, and the reference of its KL: previous is the policy of the previous
    round, sft is model.path."""
    judge: str | None = None
    """Judge that ranks the new responses: as in `eval.judge`, or `file` to stop until a person has written the
    rankings."""
    prompts: Count = 64
    """Prompts of the training split per round. The rounds use different prompts until all have been used, then start
    again."""
    completions: Count = 4
    """Responses sampled per prompt, at least 2; empty and duplicate responses are left out of the ranking."""

    def check(self) -> None:
        """Raise ValueError if there are too few completions for a ranking."""
        if self.completions < 2:
            raise ValueError(f"completions: got {self.completions}, expected at least 2 to compare")
