"""Settings of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import Section


@dataclass(frozen=True)
class ModelConfig(Section):
    """The causal language model that the policy starts from."""

    path: str | None = None
    """Folder of a Hugging Face causal LM and its tokenizer. None is valid only for commands that do not load a model
    from here."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers for scoring, training and prefill; flash_attention_2 needs a GPU and the
    package flash-attn. Decode steps use the attention of the engine, except with eager."""
