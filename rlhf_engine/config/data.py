"""Settings of the data sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_engine.config.hygiene import HygieneConfig
from rlhf_engine.config.schema import Count, PositiveShare, Section


@dataclass(frozen=True)
class DataConfig(Section):
    """Data files, the prompt template and the limits on lengths."""

    demonstrations: str | None = None
    """Demonstrations: JSONL with the fields prompt and response. `rlhf sft` trains on them; `rlhf rm` sets the reward
    model's bias so that their mean score is 0."""
    comparisons: str | None = None
    """Rankings for `rlhf rm`: JSONL with the fields prompt, completions and ranking (such as "D > C > A = B")."""
    prompts: str | None = None
    """Prompts for `rlhf ppo`, `rlhf eval` and `rlhf iterate`: JSONL with the fields prompt, user_id and optionally
    split."""
    pretrain: str | None = None
    """Pretraining text for PPO-ptx: a text file with blank lines between documents, JSONL with the field text, or a
    folder written by `save_to_disk` of Hugging Face datasets."""
    prompt_template: str = "{prompt}\n"
    """Text around every prompt; `{prompt}` is replaced with the text of the prompt. Conversations use the tokenizer's
    chat template instead."""
    long_prompts: Literal["refuse", "truncate"] = "refuse"
    """What happens to a prompt longer than rollout.max_prompt_tokens: refuse stops with an error, truncate removes
    tokens from its beginning and counts it."""
    max_response_tokens: Count = 512
    """Maximum length of a response in the data files, in tokens with EOS; a longer response is an error."""
    validation_share: PositiveShare = 0.1
    """Fraction of the demonstrations, and of the rankings, that is held out for validation."""
    hygiene: HygieneConfig = field(default_factory=HygieneConfig)
    """Cleaning of the prompts before training (`rlhf data clean`)."""

    def check(self) -> None:
        """Raise ValueError if the template has no `{prompt}`."""
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected a text that contains {{prompt}}")
