"""Configs of tiny models with recurrent states: Mamba, linear attention and short convolutions.

Legend: DENSE without experts, EXPERTS with them, WINDOWED with sliding windows of attention.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

_STATE, _FULL = "linear_attention", "full_attention"
_THREE = {"layer_types": [_STATE, _FULL, _STATE]}
_SHORT = {"layer_types": ["conv", _FULL, "conv"], "conv_L_cache": 3}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_GRANITE = {**_MAMBA2, **_THREE, "shared_intermediate_size": 32}
_MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4}
_ZAMBA = {
    "layers_block_type": [_STATE, "hybrid", _STATE],
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}

DENSE: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "head_dim": 8},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "granitemoehybrid": {**_GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0},
    "lfm2": {**_SHORT, "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "olmo_hybrid": {**_DELTA, **_THREE},
    "qwen3_5_text": {**_DELTA, **_THREE},
    "zamba": {**_MAMBA, **_ZAMBA, "n_mamba_heads": 2},
    "zamba2": {
        **_ZAMBA,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "adapter_rank": 4,
    },
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_LATENT, **_THREE, **_EXPERTS},
    "granitemoehybrid": {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {**_MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
    "kimi_linear": {**_LATENT, **_THREE, **_EXPERTS, "linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2_moe": {**_SHORT, **_EXPERTS, "num_dense_layers": 1},
    "nemotron_h": {
        "layers_block_type": [_STATE, "moe", _FULL, "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_5_moe_text": {**_DELTA, **_THREE, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_next": {**_DELTA, **_THREE, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "zaya": {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
}
WINDOWED: dict[str, dict[str, Any]] = {
    "lfm3": {**_SHORT, "layer_types": ["conv", "sliding_attention", _FULL], "sliding_window": 5},
    "zaya": {**EXPERTS["zaya"], "layer_types": ["hybrid", "hybrid_sliding", "hybrid_sliding"], "sliding_window": 5},
}

_COMMON = {"hidden_size": 32, "num_hidden_layers": 3}
_GRIFFIN = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "attention_window_size": 8}
OUTSIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": (
        "MiniMaxConfig",
        {
            **_COMMON,
            **_THREE,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 8,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {**_COMMON, **_GRIFFIN, "lru_width": 32, "block_types": ["recurrent", "recurrent", "attention"]},
    ),
    "rwkv": ("RwkvConfig", {**_COMMON, "intermediate_size": 48, "context_length": 128}),
    "xlstm": ("xLSTMConfig", {**_COMMON, "num_heads": 4, "chunk_size": 8}),
}
"""Families whose states are in no cache of transformers, or in a class of the model: as in `configs.FAMILIES`."""

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_BOTH = {"granitemoehybrid": "granitemoehybrid_moe", "zaya": "zaya_windowed"}
"""Names of the second config of a family."""

RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {**OUTSIDE}
"""Families by name: the class of the config and its arguments, as in `configs.FAMILIES`."""
for _kind in (DENSE, EXPERTS, WINDOWED):
    for _family, _settings in _kind.items():
        _name = _BOTH[_family] if _family in RECURRENT else _family
        # An older release of transformers has fewer families.
        RECURRENT[_name] = CONFIG_MAPPING_NAMES.get(_family, _family), {**SIZES, **_settings}
