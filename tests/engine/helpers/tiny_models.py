"""Small random models of each family, with logits of a large spread so that errors are visible."""

import torch
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCABULARY = 61
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
CONFIGS = {
    "llama": (LlamaConfig, {**_SIZES, "tie_word_embeddings": False}),
    "llama_tied": (LlamaConfig, {**_SIZES, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {**_SIZES, "tie_word_embeddings": False}),
    "qwen2_tied": (Qwen2Config, {**_SIZES, "tie_word_embeddings": True}),
    "gpt2": (GPT2Config, {**_GPT2, "tie_word_embeddings": False}),
    "gpt2_tied": (GPT2Config, {**_GPT2, "tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, {**_SIZES, "sliding_window": 8, "final_logit_softcapping": 5.0}),
    "mistral": (MistralConfig, {**_SIZES, "sliding_window": 7}),
    "cohere": (CohereConfig, {**_SIZES, "logit_scale": 0.25}),
    "granite": (GraniteConfig, {**_SIZES, "logits_scaling": 4.0}),
}
FAMILIES = tuple(CONFIGS)


def tiny(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a random model of `family` with `VOCABULARY` tokens, in evaluation mode."""
    kind, arguments = CONFIGS[family]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(kind(vocab_size=VOCABULARY, **special, **{**arguments, **changes})).eval()
