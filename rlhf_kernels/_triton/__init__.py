"""Launchers of the Triton kernels; `backend.Kernels` says what each of them does."""

from .elementwise import group_advantages, kl_penalty, kl_penalty_backward, scale_cast
from .ppo_loss import ppo_loss
from .sample_tokens import sample_tokens

__all__ = [
    "group_advantages",
    "kl_penalty",
    "kl_penalty_backward",
    "ppo_loss",
    "sample_tokens",
    "scale_cast",
]
