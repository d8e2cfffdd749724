"""Fused PPO operations for language models: the loss from hidden states, and the ops for the other steps of an update."""

from ._native import lend_workspace, release_workspace
from ._options import PPOOptions
from .launch_args import (
    METRICS,
    Advantages,
    PPOLoss,
    RolloutAdvantages,
    SampledTokens,
    TokenLogprobs,
    explained_variance,
)
from .modules import FusedHead
from .ops import (
    decode_attention,
    gae,
    group_advantages,
    importance_weights,
    kl_penalty,
    length_adaptive_lam,
    linear_ppo_loss,
    linear_token_logprobs,
    linear_topk_kl,
    logits_ppo_loss,
    masked_mean,
    masked_whiten,
    off_policy_sequence_mask,
    paged_attention,
    ppo_loss,
    rollout_advantages,
    sample_tokens,
    token_logprobs,
    top_entropy_mask,
)
from .ops.head import head_workspace_bytes
from .ops.weights import LowRank, QuantisedWeight, has_products
from .output_layer import HeadArguments, head_arguments
from .token_args import IMPORTANCE_METRICS, ImportanceWeights, TokenSelection, TopkKL

__all__ = [
    "IMPORTANCE_METRICS",
    "METRICS",
    "Advantages",
    "FusedHead",
    "HeadArguments",
    "ImportanceWeights",
    "LowRank",
    "PPOLoss",
    "PPOOptions",
    "QuantisedWeight",
    "RolloutAdvantages",
    "SampledTokens",
    "TokenLogprobs",
    "TokenSelection",
    "TopkKL",
    "decode_attention",
    "explained_variance",
    "gae",
    "group_advantages",
    "has_products",
    "head_arguments",
    "head_workspace_bytes",
    "importance_weights",
    "kl_penalty",
    "lend_workspace",
    "length_adaptive_lam",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "linear_topk_kl",
    "logits_ppo_loss",
    "masked_mean",
    "masked_whiten",
    "off_policy_sequence_mask",
    "paged_attention",
    "ppo_loss",
    "release_workspace",
    "rollout_advantages",
    "sample_tokens",
    "token_logprobs",
    "top_entropy_mask",
]
