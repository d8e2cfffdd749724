"""Launchers of the CUDA C++ kernels, on the current stream; `backend.Kernels` documents them."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _native
from ._native import floats
from .launch_args import LogitRows, PpoRows, RowStats, Sequences
from .token_args import IMPORTANCE_METRICS

if TYPE_CHECKING:
    import rlhf_kernels._C as native


@contextlib.contextmanager
def on_stream(x: Tensor) -> Iterator[int]:
    """Make the tensor's device the current one, and yield its current stream."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream(x.device).cuda_stream


def _workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def _inside(cu_seqlens: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Return `cu_seqlens` clamped to a non-decreasing sequence in [0, N].

    The host cannot check the values without waiting for the device, and a kernel must not read out of bounds.
    """
    if cu_seqlens is None:
        return None
    return cu_seqlens.clamp(0, tokens.numel()).cummax(0).values


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor, bootstrap: Tensor | None,
    skip_holes: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return advantages and returns; invalid `cu_seqlens` are clamped."""
    cu_seqlens = _inside(cu_seqlens, rewards)
    out = torch.empty_like(rewards), torch.empty_like(rewards)
    args = _native.gae_args(rewards, values, mask, gamma, lam, bootstrap, skip_holes, cu_seqlens, *out)
    with on_stream(rewards) as stream:
        workspace = _workspace(_native.extension().cuda_gae_workspace(args), rewards)
        _native.extension().cuda_gae(args, workspace.data_ptr(), stream)
    return out


def rollout_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, kl_coef: float,
    kl_estimator: int, gamma: float, lam: float | Tensor, score_clip: float, score_index: Tensor | None,
    bootstrap: Tensor | None, skip_holes: bool, whiten_rewards: bool, whiten_advantages: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return advantages, returns, rewards and KL; invalid `cu_seqlens` are clamped."""
    cu_seqlens = _inside(cu_seqlens, logprobs)
    advantages, returns, rewards, kl = (torch.empty_like(logprobs) for _ in range(4))
    recursion = _native.gae_args(
        rewards, values, mask, gamma, lam, bootstrap, skip_holes, cu_seqlens, advantages, returns
    )
    args = _native.rollout_args(
        recursion, scores, logprobs, ref_logprobs, score_index, rewards, kl, kl_estimator=kl_estimator, kl_coef=kl_coef,
        score_clip=score_clip, whiten_rewards=whiten_rewards, whiten_advantages=whiten_advantages,
    )  # fmt: skip
    with on_stream(logprobs) as stream:
        workspace = _workspace(_native.extension().cuda_rollout_workspace(recursion), logprobs)
        _native.extension().cuda_rollout_advantages(args, workspace.data_ptr(), stream)
    return advantages, returns, rewards, kl


def importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, advantages: Tensor | None, sequences: Sequences, level: int,
    action: int, statistic: int, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return weights, mask and metrics; invalid `cu_seqlens` are clamped, and a token of no sequence gets a NaN weight."""
    sequences = replace(sequences, cu_seqlens=_inside(sequences.cu_seqlens, logprobs))
    weights, kept = torch.full_like(logprobs, torch.nan), mask.clone()
    out = weights, kept, torch.empty(len(IMPORTANCE_METRICS), dtype=torch.float32, device=logprobs.device)
    rule = {"level": level, "action": action, "statistic": statistic, "low": low, "high": high}
    args = _native.importance_args(logprobs, sampler_logprobs, mask, advantages, sequences, out, **rule)
    with on_stream(logprobs) as stream:
        workspace = _workspace(_native.extension().cuda_importance_workspace(args), logprobs)
        _native.extension().cuda_importance_weights(args, workspace.data_ptr(), stream)
    return out


def logits_ppo_loss(
    x: LogitRows, ppo: PpoRows, stats: RowStats, coefficients: Tensor, denominator: Tensor, out: Tensor | None
) -> None:
    """Compute `stats`, `coefficients` (2, N) and, in `out`, the gradient of the logits for an upstream gradient of 1.

    `coefficients` are dL / d logprob and dL / d entropy of each row, divided by the scalar `denominator`. `out` can be the
    logits themselves; with None no gradient is computed.
    """
    with on_stream(stats.buffer) as stream:
        args = _fused_loss_args(x, ppo, stats, coefficients, denominator, out)
        extension = _native.extension()
        extension.cuda_logits_ppo_loss(args, extension.CUDA_ROW_SHARED, stream)


def rescale_dlogits(
    x: LogitRows, ppo: PpoRows, stats: RowStats, coefficients: Tensor, out: Tensor, upstream: Tensor
) -> None:
    """Rescale the gradient that `logits_ppo_loss` wrote to `out` to the upstream gradient `upstream`, a float32 scalar.

    The host does not wait for the value of `upstream`. The gradient is computed again from the logits, unless it has
    overwritten them.
    """
    with on_stream(stats.buffer) as stream:
        args = _fused_loss_args(x, ppo, stats, coefficients, None, out)
        _native.extension().cuda_rescale_dlogits(args, floats(upstream), stream)


def _fused_loss_args(
    x: LogitRows, ppo: PpoRows, stats: RowStats, coefficients: Tensor, denominator: Tensor | None, out: Tensor | None
) -> "native.LogitsPpoArgs":
    contiguous = out is None or out.is_contiguous()
    in_place = out is not None and out.data_ptr() == x.logits.data_ptr()
    assert contiguous or in_place, "a gradient with strides must share the memory of the logits"
    assert out is None or out.dtype == x.logits.dtype, "the gradient must have the dtype of the logits"
    return _native.extension().LogitsPpoArgs(
        x=_native.logit_rows(x),
        ppo=_native.ppo_rows(ppo),
        stats=floats(stats.buffer),
        coefficients=floats(coefficients),
        denominator=floats(denominator),
        dlogits=0 if out is None else out.data_ptr(),
        contiguous=contiguous,
    )
