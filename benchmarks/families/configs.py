"""Tiny random models of the decoder-only families of transformers, and of their variants with a boundary in the config.

Every boundary (sliding window, chunk, original context of a scaled rope) is below the longest sequence of the checks.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from benchmarks.families.recurrent import RECURRENT

VOCABULARY = 97
POSITIONS = 128
WINDOW = 8
ORIGINAL = 24
"""Original context of the scaled rotary embeddings, between the short and the long sequences of the checks."""

_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_LLAMA4 = {
    **_SIZES,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": WINDOW,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 2,
}
_HALF = 4
"""Numbers per head that the rotary embedding rotates, divided by 2."""


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **more}}


_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL)
_LLAMA3 = _rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL
)
_LONGROPE = {
    "original_max_position_embeddings": ORIGINAL,
    **_rope(
        "longrope",
        short_factor=[1.0] * _HALF,
        long_factor=[2.0, 3.0, 4.0, 6.0],
        original_max_position_embeddings=ORIGINAL,
    ),
}
_DYNAMIC = _rope("dynamic", factor=4.0)

_PHIMOE_ROPE = {
    "rope_parameters": {**_LONGROPE["rope_parameters"], "short_mscale": 1.0, "long_mscale": 1.3},
    "original_max_position_embeddings": ORIGINAL,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("AfmoeConfig", {**_SIZES, **_MOE, **_MIXED, "num_dense_layers": 1}),
    "apertus": ("ApertusConfig", _SIZES),
    "arcee": ("ArceeConfig", _SIZES),
    "bitnet": ("BitNetConfig", _SIZES),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}),
    "codegen": ("CodeGenConfig", {**_GPT, "rotary_dim": 4}),
    "cohere": ("CohereConfig", {**_SIZES, "logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {**_SIZES, **_MIXED, "logit_scale": 0.25}),
    "cohere2_moe": ("Cohere2MoeConfig", {**_SIZES, **_MOE, **_MIXED}),
    "ctrl": ("CTRLConfig", {**_GPT, "dff": 48}),
    "cwm": ("CwmConfig", {**_SIZES, **_MIXED}),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": POSITIONS,
            "initializer_range": 0.2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "deepseek_v2": ("DeepseekV2Config", {**_SIZES, **_ROUTED, **_LATENT, "num_key_value_heads": 4}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_SIZES, **_ROUTED, **_LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    ),
    "deepseek_v3_yarn": (
        "DeepseekV3Config",
        {**_SIZES, **_ROUTED, **_LATENT, **_YARN, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    ),
    "diffllama": ("DiffLlamaConfig", _SIZES),
    "doge": ("DogeConfig", _SIZES),
    "doge_moe": ("DogeConfig", {**_SIZES, "is_moe": True, "num_experts": 4, "num_experts_per_tok": 2}),
    "dots1": ("Dots1Config", {**_SIZES, **_ROUTED, **_MIXED, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "ernie4_5": ("Ernie4_5Config", _SIZES),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {
            **_SIZES,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "exaone4": ("Exaone4Config", {**_SIZES, **_MIXED}),
    "falcon": (
        "FalconConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "alibi": False,
            "initializer_range": 0.2,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "falcon_multi_query": (
        "FalconConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            "new_decoder_architecture": False,
            "alibi": False,
            "initializer_range": 0.2,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "falcon_alibi": (
        "FalconConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
            "initializer_range": 0.2,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "flex_olmo": ("FlexOlmoConfig", {**_SIZES, **_MOE}),
    "gemma": ("GemmaConfig", _SIZES),
    "gemma2": ("Gemma2Config", {**_SIZES, **_MIXED, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", {**_SIZES, **_MIXED}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **_SIZES,
            **_MIXED,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **_SIZES,
            **_MIXED,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
        },
    ),
    "gemma4_shared": (
        "Gemma4TextConfig",
        {
            **_SIZES,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
        },
    ),
    "gemma4_moe": (
        "Gemma4TextConfig",
        {
            **_SIZES,
            **_MIXED,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "glm": ("GlmConfig", _SIZES),
    "glm4": ("Glm4Config", _SIZES),
    "glm4_moe": ("Glm4MoeConfig", {**_SIZES, **_ROUTED, "first_k_dense_replace": 1}),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {**_SIZES, **_ROUTED, **_LATENT, "num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
        },
    ),
    "gpt_neo_global": (
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global"], 2]],
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseConfig",
        {name: value for name, value in _SIZES.items() if name != "intermediate_size"},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_SIZES, **_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2, **_rope("default")},
    ),
    "gpt_oss_yarn": ("GptOssConfig", {**_SIZES, **_MIXED, **_YARN, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "granite": (
        "GraniteConfig",
        {
            **_SIZES,
            "logits_scaling": 4.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 2.0,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    ),
    "helium": ("HeliumConfig", _SIZES),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", _SIZES),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {**_SIZES, "num_experts": 4, "moe_topk": 2}),
    "hyperclovax": (
        "HyperCLOVAXConfig",
        {**_SIZES, "attention_multiplier": 0.5, "logits_scaling": 0.5, "residual_multiplier": 0.7},
    ),
    "internlm3": ("InternLM3Config", _SIZES),
    "jais2": ("Jais2Config", _SIZES),
    "jetmoe": (
        "JetMoeConfig",
        {**_SIZES, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama": ("LlamaConfig", _SIZES),
    "llama_llama3": ("LlamaConfig", {**_SIZES, **_LLAMA3}),
    "llama_yarn": ("LlamaConfig", {**_SIZES, **_YARN}),
    "llama_linear": ("LlamaConfig", {**_SIZES, **_rope("linear", factor=4.0)}),
    "llama_dynamic": ("LlamaConfig", {**_SIZES, **_DYNAMIC, "max_position_embeddings": ORIGINAL}),
    "llama_longrope": ("LlamaConfig", {**_SIZES, **_LONGROPE}),
    "llama4_text": ("Llama4TextConfig", {**_LLAMA4, "floor_scale": 64}),
    "llama4_text_tuned": ("Llama4TextConfig", {**_LLAMA4, "floor_scale": 16}),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        {
            **_SIZES,
            **_MIXED,
            **_ROUTED,
            "v_head_dim": 6,
            "swa_head_dim": 8,
            "swa_v_head_dim": 6,
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "minicpm3": ("MiniCPM3Config", {**_SIZES, **_LATENT, "dim_model_base": 32, "num_key_value_heads": 4}),
    "minimax_m2": ("MiniMaxM2Config", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ministral": ("MinistralConfig", {**_SIZES, **_MIXED}),
    "ministral3": ("Ministral3Config", _SIZES),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": WINDOW}),
    "mixtral": (
        "MixtralConfig",
        {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "modernbert-decoder": (
        "ModernBertDecoderConfig",
        {**_SIZES, "local_attention": WINDOW, "global_attn_every_n_layers": 2},
    ),
    "mpt": (
        "MptConfig",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS, "initializer_range": 0.2},
    ),
    "nanochat": ("NanoChatConfig", _SIZES),
    "nemotron": ("NemotronConfig", _SIZES),
    "olmo": ("OlmoConfig", _SIZES),
    "olmo2": ("Olmo2Config", _SIZES),
    "olmo3": ("Olmo3Config", {**_SIZES, **_MIXED}),
    "olmoe": ("OlmoeConfig", {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "openai-gpt": ("OpenAIGPTConfig", _GPT),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": 32,
            "init_std": 0.2,
        },
    ),
    "persimmon": ("PersimmonConfig", _SIZES),
    "phi": ("PhiConfig", _SIZES),
    "phi3": ("Phi3Config", {**_SIZES, "sliding_window": WINDOW}),
    "phi3_longrope": ("Phi3Config", {**_SIZES, **_LONGROPE}),
    "phimoe": ("PhimoeConfig", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "phimoe_longrope": (
        "PhimoeConfig",
        {**_SIZES, **_PHIMOE_ROPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2": ("Qwen2Config", {**_SIZES, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_SIZES, **_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3": ("Qwen3Config", _SIZES),
    "qwen3_moe": ("Qwen3MoeConfig", {**_SIZES, **_MOE}),
    "seed_oss": ("SeedOssConfig", _SIZES),
    "smollm3": ("SmolLM3Config", {**_SIZES, "no_rope_layers": [1, 0]}),
    "solar_open": ("SolarOpenConfig", {**_SIZES, **_ROUTED}),
    "stablelm": ("StableLmConfig", _SIZES),
    "starcoder2": ("Starcoder2Config", {**_SIZES, "sliding_window": WINDOW}),
    "vaultgemma": ("VaultGemmaConfig", {**_SIZES, **_MIXED}),
    "xglm": (
        "XGLMConfig",
        {
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "init_std": 0.2,
        },
    ),
    "youtu": ("YoutuConfig", {**_SIZES, **_LATENT, "num_key_value_heads": 4}),
    **RECURRENT,
}


FLOAT32 = ("xglm",)
"""Families whose code in transformers cannot run in float64, and which are compared in float32."""


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model of a family in evaluation mode, with a large spread of its logits."""
    kind, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**_IDS, **arguments, **changes})
    return AutoModelForCausalLM.from_config(config).eval()
