"""Published shapes of common models: the fields of their `config.json` that decide memory, without weights."""

from __future__ import annotations

from typing import Any


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, groups: int, *, vocab: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 32768 if tied else 131072,
        "tie_word_embeddings": tied,
    }


def _llama3(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": tied,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, vocab=151936, tied=True),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 64, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, vocab=151936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 11008, 36, 16, 2, vocab=151936, tied=True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 128, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, vocab=152064, tied=False),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 128, tied=False),
    "qwen2.5-14b": _qwen2(5120, 13824, 48, 40, 8, vocab=152064, tied=False),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, vocab=152064, tied=False),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 128, tied=False),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, vocab=152064, tied=False),
}
"""Name -> fields, smallest first."""
