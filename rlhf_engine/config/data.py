"""Settings of the data sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from rlhf_engine.config.hygiene import HygieneConfig
from rlhf_engine.config.schema import Count, PositiveShare, Section, Variables

_OWN_ARGUMENTS = (
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens", "strftime_now"),
)
"""Arguments of `apply_chat_template` that the engine sets or does not use."""


@dataclass(frozen=True)
class DataConfig(Section):
    """Data files, the prompt template and the limits on lengths."""

    demonstrations: str | None = None
    """Demonstrations: JSONL with the fields prompt and response, or a format of docs/guides/data_formats.md. `rlhf sft`
    trains on them; `rlhf rm` sets the reward model's bias so that their mean score is 0."""
    comparisons: str | None = None
    """Rankings for `rlhf rm`: JSONL with the fields prompt, completions and ranking (such as "D > C > A = B"), or prompt,
    chosen and rejected."""
    prompts: str | None = None
    """Prompts for `rlhf ppo`, `rlhf eval` and `rlhf iterate`: JSONL with the field prompt and optionally user_id and
    split. Further fields, such as a reference answer, are arguments of reward.function."""
    pretrain: str | None = None
    """Pretraining text for PPO-ptx: a text file with blank lines between documents, JSONL with the field text, or a
    folder written by `save_to_disk` of Hugging Face datasets."""
    prompt_template: str = "{prompt}\n"
    """Text around every prompt; `{prompt}` is replaced with the text of the prompt. Conversations use the tokenizer's
    chat template instead."""
    chat_template_kwargs: Variables = field(default_factory=dict)
    """Variables of the tokenizer's chat template, such as {enable_thinking: false}. A name that the template does not
    read is an error."""
    chat_template_date: str | None = None
    """Date that a chat template sees, as YYYY-MM-DD. If None, and the template reads the date, it is that of the first
    command with this output_dir, which is stored in OUTPUT_DIR/chat_template.json."""
    keep_special_tokens: bool = True
    """Keep special tokens, such as <think>, in the text of a response that a reward function, a judge or a file gets,
    and read them as tokens in the responses of data files. BOS, EOS and PAD are removed in any case. If false, all are
    removed, and they are plain text in data files."""
    unknown_columns: Literal["ignore", "refuse"] = "ignore"
    """Handling of columns of the data files that are neither part of a format nor arguments of reward.function: ignore
    lists them in one line, refuse stops with an error."""
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
        """Raise ValueError for a template without `{prompt}`, an argument that the engine sets, or an invalid date."""
        if "{prompt}" not in self.prompt_template:
            raise ValueError(f"prompt_template: got {self.prompt_template!r}, expected a text that contains {{prompt}}")
        for name in self.chat_template_kwargs:
            if name in _OWN_ARGUMENTS:
                hint = "set data.chat_template_date" if name == "strftime_now" else "remove it"
                raise ValueError(f"chat_template_kwargs: the engine sets {name!r}; {hint}")
        if self.chat_template_date is not None:
            try:
                date.fromisoformat(self.chat_template_date)
            except ValueError:
                raise ValueError(
                    f"chat_template_date: got {self.chat_template_date!r}, expected a date such as '2026-01-31'"
                ) from None

    def allowed_columns(self, *names: str) -> tuple[str, ...] | None:
        """Return `names`, which are the further columns that a row may have; None if it may have any."""
        return names if self.unknown_columns == "refuse" else None
