"""Launchers of the CUDA C++ kernels, on the current stream; `backend.Kernels` says what each of them does."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import _native
from ._native import address


@contextlib.contextmanager
def on_stream(x: Tensor) -> Iterator[int]:
    """The current stream of the tensor's device, which is the current device inside."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream(x.device).cuda_stream


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def gae(rewards, values, mask, gamma, lam, bootstrap, skip_holes, cu_seqlens) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(rewards), torch.empty_like(rewards)
    args = _native.gae_args(rewards, values, mask, gamma, lam, bootstrap, skip_holes, cu_seqlens, *out)
    with on_stream(rewards) as stream:
        workspace = _workspace(_native.extension().cuda_gae_workspace(args), rewards)
        _native.extension().cuda_gae(args, workspace.data_ptr(), stream)
    return out


def rollout_advantages(
    scores, logprobs, ref_logprobs, values, mask, kl_coef, kl_estimator, gamma, lam, score_clip, score_index, bootstrap,
    skip_holes, whiten_rewards, whiten_advantages, cu_seqlens,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    advantages, returns, rewards, kl = (torch.empty_like(logprobs) for _ in range(4))
    recursion = _native.gae_args(
        rewards, values, mask, gamma, lam, bootstrap, skip_holes, cu_seqlens, advantages, returns
    )
    with on_stream(logprobs) as stream:
        workspace = _workspace(_native.extension().cuda_rollout_workspace(recursion), logprobs)
        _native.extension().cuda_rollout_advantages(
            recursion, address(scores), address(logprobs), address(ref_logprobs), address(score_index), kl_estimator,
            kl_coef, score_clip, whiten_rewards, whiten_advantages, address(rewards), address(kl), workspace.data_ptr(),
            stream,
        )  # fmt: skip
    return advantages, returns, rewards, kl
