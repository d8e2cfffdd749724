"""Settings of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Section


@dataclass(frozen=True)
class ModelConfig(Section):
    """The causal language model that the policy starts from."""

    path: str | None = None
    """Folder of a Hugging Face causal LM and its tokenizer; None where an earlier stage makes the model."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation that transformers is asked for; flash_attention_2 needs a GPU and the package flash-attn, and
    scores, trains and reads prompts. Decoding has an attention of its own, but for eager."""
