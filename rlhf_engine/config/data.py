"""Settings of the data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_engine.config.hygiene import HygieneConfig
from rlhf_engine.config.schema import Count, PositiveShare, Section


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the records come from."""

    demonstrations: str | None = None
    """JSONL of prompt, response."""
    comparisons: str | None = None
    """JSONL of prompt, completions, ranking ("D > C > A = B")."""
    prompts: str | None = None
    """JSONL of prompt, user_id and, if wanted, split."""
    pretrain: str | None = None
    """Text for PPO-ptx: .txt with blank lines between documents, JSONL with a field `text`, or a data set's folder."""
    prompt_template: str = "{prompt}\n"
    """Frame of a prompt; `{prompt}` stands for its text."""
    long_prompts: Literal["refuse", "truncate"] = "refuse"
    """What happens to a prompt longer than rollout.max_prompt_tokens: refused, or cut on the left and counted."""
    max_response_tokens: Count = 512
    """Longest answer in the files, EOS included; a longer one is refused."""
    validation_share: PositiveShare = 0.1
    """Share of the demonstrations and of the rankings that is held out for validation."""
    hygiene: HygieneConfig = field(default_factory=HygieneConfig)
    """Cleaning of prompts, before any training."""

    def check(self) -> None:
        """A frame has a place for the prompt."""
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected a text with {{prompt}} in it")
