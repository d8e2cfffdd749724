"""Launchers of the C++ kernels on CPU tensors; `backend.Kernels` documents them."""

import torch
from torch import Tensor

from . import _native
from ._native import address, floats
from .launch_args import LogitRows, PpoRows, RowStats, Sequences
from .token_args import ENTROPY_METRICS, IMPORTANCE_METRICS, TopkRows


def token_logprobs_forward(x: LogitRows, stats: RowStats) -> None:
    """Compute the statistics of each row."""
    _native.extension().token_logprobs_forward(_native.logit_rows(x), address(stats.buffer))


def token_logprobs_backward(
    x: LogitRows, stats: RowStats, out: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> None:
    """Write the gradient of the logits to `out`."""
    contiguous = out.is_contiguous()
    assert contiguous or out.data_ptr() == x.logits.data_ptr(), (
        "a gradient with strides must share the memory of the logits"
    )
    gradients = map(floats, (grad_logprobs, grad_entropy))
    buffer = floats(stats.buffer)
    _native.extension().token_logprobs_backward(_native.logit_rows(x), buffer, out.data_ptr(), contiguous, *gradients)


def ppo_epilogue(x: LogitRows, stats: RowStats, ppo: PpoRows, out: Tensor) -> Tensor:
    """Compute the statistics, overwrite the logits with their gradient, and return which rows have one."""
    assert out.data_ptr() == x.logits.data_ptr() and out.dtype == x.logits.dtype, (
        "the gradient must overwrite the logits"
    )
    active = torch.empty(x.ids.numel(), dtype=torch.bool)
    _native.extension().ppo_epilogue(
        _native.logit_rows(x), address(stats.buffer), _native.ppo_rows(ppo), address(active)
    )
    return active


def compact_rows(x: Tensor, active: Tensor) -> Tensor:
    """Move marked rows from the end into unmarked places at the front; return the original index of each row."""
    order = active.nonzero().squeeze(1)
    kept = order.numel()
    holes = (~active[:kept]).nonzero().squeeze(1)
    if holes.numel():
        movers = order[-holes.numel() :].clone()
        row_bytes = x.shape[1] * x.element_size()
        _native.extension().move_rows(address(x), address(holes), address(movers), holes.numel(), row_bytes)
        order = torch.arange(kept).index_copy_(0, holes, movers)
    return order


def ppo_loss(
    ppo: PpoRows,
    sequences: Sequences,
    sequence_level: bool,
    mask: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    value_mask: Tensor,
    value_row_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slopes and the sums of the objective; the values of `cu_seqlens` are checked."""
    slope = torch.empty_like(logprobs)
    value_slope = torch.empty_like(logprobs if values is not None else logprobs[:0])
    sums = torch.empty(_native.NUM_SUMS, dtype=torch.float64)
    sequences.check(logprobs.numel())
    _native.extension().ppo_loss(
        ppo=_native.ppo_rows(ppo),
        n=logprobs.numel(),
        sequences=sequences.count,
        length=sequences.length,
        cu_seqlens=address(sequences.cu_seqlens),
        sequence_level=sequence_level,
        mask=address(mask),
        logprobs=floats(logprobs),
        entropy=floats(entropy),
        values=floats(values),
        old_values=floats(old_values),
        returns=floats(returns),
        value_mask=address(value_mask),
        value_row_weight=floats(value_row_weight),
        slope=floats(slope),
        value_slope=floats(value_slope),
        sums=address(sums),
    )
    return slope, value_slope, sums


def accumulate(total: Tensor, part: Tensor, *, first: bool) -> None:
    """Set or add to a float32 sum."""
    dtype = _native.DTYPES[part.dtype]
    _native.extension().accumulate(address(total), address(part), dtype, part.numel(), first)


def scale_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x * scale`, rounded once, in place if the dtype does not change."""
    out = x if x.dtype == dtype else _native.empty(x.shape, dtype, x.device)
    dtypes = _native.DTYPES[x.dtype], _native.DTYPES[dtype]
    _native.extension().scale_cast(address(x), dtypes[0], address(out), dtypes[1], x.numel(), scale.item())
    return out


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor, bootstrap: Tensor | None,
    skip_holes: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return advantages and returns; the values of `cu_seqlens` are checked."""
    Sequences.of(rewards, cu_seqlens).check(rewards.numel())
    out = torch.empty_like(rewards), torch.empty_like(rewards)
    args = _native.gae_args(rewards, values, mask, gamma, lam, bootstrap, skip_holes, cu_seqlens, *out)
    _native.extension().gae(args)
    return out


def rollout_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, kl_coef: float,
    kl_estimator: int, gamma: float, lam: float | Tensor, score_clip: float, score_index: Tensor | None,
    bootstrap: Tensor | None, skip_holes: bool, whiten_rewards: bool, whiten_advantages: bool, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return advantages, returns, rewards and KL; the values of `cu_seqlens` are checked."""
    Sequences.of(logprobs, cu_seqlens).check(logprobs.numel())
    advantages, returns, rewards, kl = (torch.empty_like(logprobs) for _ in range(4))
    recursion = _native.gae_args(
        rewards, values, mask, gamma, lam, bootstrap, skip_holes, cu_seqlens, advantages, returns
    )
    args = _native.rollout_args(
        recursion, scores, logprobs, ref_logprobs, score_index, rewards, kl, kl_estimator=kl_estimator, kl_coef=kl_coef,
        score_clip=score_clip, whiten_rewards=whiten_rewards, whiten_advantages=whiten_advantages,
    )  # fmt: skip
    _native.extension().rollout_advantages(args)
    return advantages, returns, rewards, kl


def sample_tokens(
    logits: Tensor, temperature: float, temperatures: Tensor | None, top_k: int, top_p: float, min_p: float, seed: int,
    sequence: Tensor, position: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ids, log-probs and sampling log-probs."""
    b, v = logits.shape
    ids, logprobs, sampling_logprobs = torch.empty(b, dtype=torch.int64), torch.empty(b), torch.empty(b)
    _native.extension().sample_tokens(
        logits=logits.data_ptr(),
        dtype=_native.DTYPES[logits.dtype],
        rows=b,
        vocab=v,
        row_stride=logits.stride(0),
        temperature=temperature,
        temperatures=address(temperatures),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        sequence=address(sequence),
        position=address(position),
        ids=address(ids),
        logprobs=address(logprobs),
        sampling_logprobs=address(sampling_logprobs),
    )
    return ids, logprobs, sampling_logprobs


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the attention of one query per row."""
    out = torch.empty_like(query)
    rows, heads, size = query.shape
    _native.extension().decode_attention(
        query=address(query),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        dtype=_native.DTYPES[query.dtype],
        rows=rows,
        heads=heads,
        groups=keys.shape[1],
        width=keys.shape[2],
        size=size,
        key_strides=keys.stride()[:3],
        value_strides=values.stride()[:3],
        mask=address(mask),
        scale=scale,
        out=address(out),
    )
    return out


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    """Return the KL estimate of each element."""
    out = torch.empty_like(logprobs)
    _native.extension().kl_penalty(address(logprobs), address(ref_logprobs), out.numel(), estimator, address(out))
    return out


def kl_penalty_backward(grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: int) -> Tensor:
    """Return `grad` times d KL / d logprobs."""
    out = torch.empty_like(logprobs)
    tensors = map(address, (grad, logprobs, ref_logprobs))
    _native.extension().kl_penalty_backward(*tensors, out.numel(), estimator, address(out))
    return out


def importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, advantages: Tensor | None, sequences: Sequences, level: int,
    action: int, statistic: int, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return weights, mask and metrics; the values of `cu_seqlens` are checked."""
    sequences.check(logprobs.numel())
    out = torch.empty_like(logprobs), torch.empty_like(mask), torch.empty(len(IMPORTANCE_METRICS))
    rule = {"level": level, "action": action, "statistic": statistic, "low": low, "high": high}
    tokens = logprobs, sampler_logprobs, mask, advantages
    _native.extension().importance_weights(_native.importance_args(*tokens, sequences, out, **rule))
    return out


def top_entropy_mask(entropy: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the mask of the tokens that remain, and the metrics."""
    kept, metrics = torch.empty_like(mask), torch.empty(len(ENTROPY_METRICS))
    tensors = address(entropy), address(mask)
    _native.extension().top_entropy_mask(*tensors, mask.numel(), share, address(kept), address(metrics))
    return kept, metrics


def topk_epilogue(x: LogitRows, topk: TopkRows, found: Tensor, out: Tensor) -> Tensor:
    """Compute `found`, overwrite the logits with their gradient, and return which rows have one."""
    assert out.data_ptr() == x.logits.data_ptr() and out.dtype == x.logits.dtype, (
        "the gradient must overwrite the logits"
    )
    active = torch.empty(len(topk.ids), dtype=torch.bool)
    extension = _native.extension()
    args = extension.TopkArgs(
        x=_native.logit_rows(x),
        k=topk.ids.shape[1],
        ids=address(topk.ids),
        logprobs=floats(topk.logprobs),
        row_weight=floats(topk.row_weight),
        **topk.rule._asdict(),
        found=floats(found),
        active=address(active),
    )
    extension.topk_epilogue(args)
    return active


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the True entries."""
    out = torch.empty(())
    _native.extension().masked_mean(address(x), address(mask), x.numel(), out.data_ptr())
    return out


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool) -> Tensor:
    """Return the True entries whitened, zeros elsewhere."""
    out = torch.empty_like(x)
    _native.extension().masked_whiten(address(x), address(mask), x.numel(), shift_mean, unbiased, address(out))
    return out


def group_advantages(scores: Tensor, groups: Tensor, kind: int, eps: float, population: bool) -> Tensor:
    """Return one advantage per score."""
    out = torch.empty_like(scores)
    how = (kind, eps, population)
    _native.extension().group_advantages(address(scores), address(groups), out.numel(), *how, address(out))
    return out
