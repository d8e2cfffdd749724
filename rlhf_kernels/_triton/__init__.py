"""Triton kernels and their launchers, no autograd; `backend.Kernels` says what each launcher does."""

from .compaction import compact_rows
from .rows import ppo_epilogue, token_logprobs_backward, token_logprobs_forward

__all__ = ["compact_rows", "ppo_epilogue", "token_logprobs_backward", "token_logprobs_forward"]
