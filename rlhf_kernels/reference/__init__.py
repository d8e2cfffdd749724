"""The definition of every op in eager PyTorch, differentiated by autograd and computed in the dtype of the inputs.

The dtype can be float64. The functions do not check their arguments: `rlhf_kernels.ops` checks them for all backends.
It imports this package only for calls that use the reference backend.
"""

from .decode_attention import decode_attention
from .gae import gae
from .group_advantages import group_advantages
from .importance_weights import importance_weights, off_policy_sequence_mask
from .kl_penalty import kl_penalty
from .linear_topk_kl import linear_topk_kl
from .masked import masked_mean, masked_whiten
from .paged_attention import paged_attention
from .ppo_loss import linear_ppo_loss, logits_ppo_loss, ppo_loss
from .rollout_advantages import rollout_advantages
from .sample_tokens import sample_tokens
from .sharded_head import sharded_ppo_loss, sharded_token_logprobs
from .token_logprobs import linear_token_logprobs, token_logprobs, transform_logits
from .top_entropy_mask import top_entropy_mask

__all__ = [
    "decode_attention",
    "gae",
    "group_advantages",
    "importance_weights",
    "kl_penalty",
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
    "sharded_ppo_loss",
    "sharded_token_logprobs",
    "token_logprobs",
    "top_entropy_mask",
    "transform_logits",
]
