"""Launchers of the Triton kernels; `backend.Kernels` says what each of them does."""

from .compaction import compact_rows
from .elementwise import group_advantages, kl_penalty, kl_penalty_backward, scale_cast
from .ppo_loss import ppo_loss
from .rows import ppo_epilogue, token_logprobs_backward, token_logprobs_forward
from .sample_tokens import sample_tokens

__all__ = [
    "compact_rows",
    "group_advantages",
    "kl_penalty",
    "kl_penalty_backward",
    "ppo_epilogue",
    "ppo_loss",
    "sample_tokens",
    "scale_cast",
    "token_logprobs_backward",
    "token_logprobs_forward",
]
