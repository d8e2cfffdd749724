"""The public functions. Each checks its arguments once and calls a backend."""

from .decode_attention import decode_attention
from .gae import gae, length_adaptive_lam
from .group_advantages import group_advantages
from .importance_weights import importance_weights, off_policy_sequence_mask
from .kl_penalty import kl_penalty
from .linear_ppo_loss import linear_ppo_loss
from .linear_token_logprobs import linear_token_logprobs
from .linear_topk_kl import linear_topk_kl
from .logits_ppo_loss import logits_ppo_loss
from .masked import masked_mean, masked_whiten
from .paged_attention import paged_attention
from .ppo_loss import ppo_loss
from .rollout_advantages import rollout_advantages
from .sample_tokens import sample_tokens
from .token_logprobs import token_logprobs
from .top_entropy_mask import top_entropy_mask

__all__ = [
    "decode_attention",
    "gae",
    "group_advantages",
    "importance_weights",
    "kl_penalty",
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
    "rollout_advantages",
    "sample_tokens",
    "token_logprobs",
    "top_entropy_mask",
]
