"""Log-probability and entropy of taken tokens, from hidden states."""

import torch
from torch import Tensor

from .. import reference
from ..backend import kernels, resolve
from ..launch_args import RowStats, Transform
from ..types import TokenLogprobs
from . import checks
from .head import Head, HeadRows, given_pass, head_stats
from .ppo_terms import flat
from .products import Plan
from .registry import define, refuse, schema_of


def linear_token_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (...)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # (...), bool
    entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """`token_logprobs` of the logits `hidden @ weight.T + bias`, which never exist as a whole.

    The rows under a True mask (on a GPU all rows, since counting those would wait for it) are taken in chunks of
    `chunk_tokens` (None: chosen from the sizes); backward makes each chunk's logits again. Differentiable in `hidden`,
    `weight` and `bias`.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit; on CPU an id outside [0, V) under a True mask.
    """
    temperature = checks.constant(temperature)
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_head(hidden, weight, ids, bias, temperature, softcap, logit_scale, mask, chunk_tokens)
    chosen = resolve("linear_token_logprobs", backend, hidden, len(weight))
    if chosen == "reference":
        return reference.linear_token_logprobs(
            hidden,
            weight,
            ids.long(),
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            mask=mask,
            entropy=entropy,
        )
    per_row = flat(temperature) if isinstance(temperature, Tensor) else None
    logprobs, h, _ = _op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        ids.reshape(-1).long(),
        None if mask is None else mask.reshape(-1),
        per_row,
        1.0 if per_row is not None else float(temperature),
        softcap,
        float(logit_scale),
        chunk_tokens,
        chosen,
    )
    return TokenLogprobs(logprobs.view(ids.shape), h.view(ids.shape) if entropy else None)


def under_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's inputs in autocast's dtype where it is on, as `torch.nn.functional.linear` would take them.

    As there, float64 stays what it is.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_head(hidden, weight, ids, bias, temperature, softcap, logit_scale, mask, chunk_tokens) -> None:
    checks.floating("hidden", hidden, dims=tuple(range(1, 8)), what="[..., H]")
    rows, h = hidden.shape[:-1], hidden.shape[-1]
    checks.floating("weight", weight, dims=(2,), what="[V, H]")
    v = weight.shape[0]
    checks.tensor("weight", weight, like=hidden, expected=(v, h), what="[V, H]", dtypes=(hidden.dtype,))
    if v == 0 or h == 0:
        raise ValueError(f"weight: got shape {checks.shape(weight)}, expected V >= 1 and H >= 1")
    if bias is not None:
        checks.tensor("bias", bias, like=hidden, expected=(v,), what="[V]", dtypes=(hidden.dtype,))
    if mask is not None:
        checks.mask("mask", mask, like=hidden, expected=rows, what="the shape of ids")
    checks.ids(ids, like=hidden, expected=rows, vocabulary=v, where=mask)
    checks.temperature(temperature, like=hidden, expected=rows)
    checks.number("softcap", softcap, above=0, optional=True)
    checks.number("logit_scale", logit_scale, above=0)
    checks.number("chunk_tokens", chunk_tokens, least=1, optional=True, integer=True)


def _forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,
    ids: Tensor,  # (N,)
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_tokens: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n = ids.numel()
    plan = Plan.of(n, len(weight), hidden.dtype, backend, chunk_tokens, None)
    rows = _rows(hidden, ids, mask, temperatures, temperature, softcap, logit_scale, plan)
    stats = head_stats(kernels(backend), Head(weight, bias), rows, plan)
    buffer = rows.spread(stats.buffer, n)
    return buffer[0].clone(), buffer[1].clone(), buffer


def _fake(hidden, weight, bias, ids, *rest):
    n = ids.numel()
    return tuple(hidden.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (4, n)))


def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    stats: Tensor,  # (4, N)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_tokens: int | None,
    backend: str,
    needs: list[bool],  # a gradient: hidden, weight, bias
    unrounded: list[bool],  # and whether in float32
) -> tuple[Tensor, Tensor, Tensor]:
    n = ids.numel()
    g, h = (None if x is None else x.float() for x in (grad_logprobs, grad_entropy))
    live = sum(x.abs() for x in (g, h) if x is not None) != 0
    keep = live if mask is None else live & mask
    g, h = (None if x is None else torch.where(keep, x, 0) for x in (g, h))  # whatever lies in masked rows
    plan = Plan.of(n, len(weight), hidden.dtype, backend, chunk_tokens, None)
    rows = _rows(hidden, ids, keep, temperatures, temperature, softcap, logit_scale, plan)
    # Relative to the largest coefficient: half-precision gradients of logits would underflow under a small one.
    largest = torch.stack([x.abs().amax() for x in (g, h) if x is not None]).amax() if n else hidden.new_ones(())
    largest = torch.where(largest > 0, largest, 1).float()
    coefficients = (None if x is None else rows.take(x) / largest for x in (g, h))
    kept = RowStats(stats if rows.index is None else stats[:, rows.index])
    launch = kernels(backend)
    results = given_pass(launch, Head(weight, bias), rows, kept, *coefficients, n, plan, tuple(needs))
    return tuple(
        hidden.new_empty(0) if g is None else launch.scale_cast(g, largest, torch.float32 if wide else hidden.dtype)
        for g, wide in zip(results, unrounded, strict=True)
    )


def _fake_backward(grad_logprobs, grad_entropy, stats, hidden, weight, bias, *rest):
    *_, needs, unrounded = rest
    wanted = zip((hidden, weight, bias), needs, unrounded, strict=True)
    return tuple(
        hidden.new_empty(x.shape if needed else (0,), dtype=torch.float32 if wide else hidden.dtype)
        for x, needed, wide in wanted
    )


def _rows(hidden, ids, keep, temperatures, temperature, softcap, logit_scale, plan: Plan) -> HeadRows:
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    return HeadRows.of(hidden, ids, transform, keep, gather=plan.compact)


def gradient_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a gradient of `x` is handed over: `x.grad_dtype` where that was set (compilers know it not)."""
    return (x.grad_dtype if checks.is_eager(x) and x.is_leaf else None) or x.dtype


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, ids, mask, temperatures, *ctx.scalars = inputs
    _, _, stats = output
    ctx.unrounded = [x is not None and gradient_dtype(x) is torch.float32 for x in (hidden, weight, bias)]
    ctx.save_for_backward(stats, hidden, weight, bias, ids, mask, temperatures)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprobs, grad_entropy, _):
    nothing = (None,) * 8
    needs = list(ctx.needs_input_grad[:3])
    if not any(needs) or (grad_logprobs is None and grad_entropy is None):
        return None, None, None, *nothing
    results = _backward_op(grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.scalars, needs, ctx.unrounded)
    return *(g if needed else None for g, needed in zip(results, needs, strict=True)), *nothing


_backward_op = define(
    schema_of("linear_token_logprobs_backward", _backward), run=_backward, fake=_fake_backward, backward=refuse
)
_op = define(
    schema_of("linear_token_logprobs", _forward), run=_forward, fake=_fake, save=_save, backward=_differentiate
)
