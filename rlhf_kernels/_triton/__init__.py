"""Triton kernels and their launchers, no autograd; `backend.Kernels` says what each launcher does."""

from .compaction import compact_rows
from .gae import gae
from .masked import masked_mean, masked_whiten
from .rollout_advantages import rollout_advantages
from .rows import ppo_epilogue, token_logprobs_backward, token_logprobs_forward

__all__ = [
    "compact_rows",
    "gae",
    "masked_mean",
    "masked_whiten",
    "ppo_epilogue",
    "rollout_advantages",
    "token_logprobs_backward",
    "token_logprobs_forward",
]
