"""Launchers of the Triton kernels; `backend.Kernels` documents them."""

from .compaction import compact_rows
from .elementwise import accumulate, group_advantages, kl_penalty, kl_penalty_backward, scale_cast
from .gae import gae
from .importance_weights import importance_weights
from .linear_topk_kl import topk_epilogue
from .masked import masked_mean, masked_whiten
from .paged_attention import paged_attention
from .ppo_loss import ppo_loss
from .rollout_advantages import rollout_advantages
from .rows import ppo_epilogue, token_logprobs_backward, token_logprobs_forward
from .sample_tokens import sample_tokens
from .top_entropy_mask import top_entropy_mask

__all__ = [
    "accumulate",
    "compact_rows",
    "gae",
    "group_advantages",
    "importance_weights",
    "kl_penalty",
    "kl_penalty_backward",
    "masked_mean",
    "masked_whiten",
    "paged_attention",
    "ppo_epilogue",
    "ppo_loss",
    "rollout_advantages",
    "sample_tokens",
    "scale_cast",
    "token_logprobs_backward",
    "token_logprobs_forward",
    "top_entropy_mask",
    "topk_epilogue",
]
