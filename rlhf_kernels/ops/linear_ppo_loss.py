"""The PPO objective from hidden states: policy and value head in one read, three matrix products, no [N, V] tensor."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from ..backend import Kernels, kernels, resolve
from ..launch_args import Transform
from ..types import METRICS, PPOLoss
from . import checks
from .head import Head, HeadRows, given_pass, head_stats, ppo_pass
from .linear_token_logprobs import check_head, gradient_dtype, under_autocast
from .ppo_arguments import PPOArguments
from .ppo_terms import ObjectiveTerms, as_loss, flat
from .products import Plan
from .registry import define, refuse, schema_of

VALUE_ROWS = 1024
"""Rows of hidden states that the value head casts to float32 at a time."""


def linear_ppo_loss(
    hidden: Tensor,  # (B, T, H) or (N, H), differentiable
    weight: Tensor,  # (V, H), differentiable
    ids: Tensor,  # (B, T) or (N,)
    old_logprobs: Tensor,  # (B, T) or (N,)
    advantages: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    bias: Tensor | None = None,  # (V,), differentiable
    value_weight: Tensor | None = None,  # (H,), differentiable
    value_bias: Tensor | None = None,  # (), differentiable
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    compact: bool | None = None,
    backend: str = "auto",
    **options: Any,
) -> PPOLoss:
    """`logits_ppo_loss` of `hidden @ weight.T + bias`, and the value loss of `hidden @ value_weight + value_bias`.

    Gradients are made in the forward pass, chunk by chunk, and scaled in backward: a second backward raises, and a
    checkpointed region would do the work twice. Masked rows enter no matrix product; rows whose log-prob and entropy
    coefficients are exactly zero (clipped, no advantage) enter none of the backward ones. On a GPU both need
    `compact=True`, since their number has to reach the host: one wait a call and one a chunk, and no graph capture; without
    it those rows are zeros in the products. On CPU they are always left out. The reference backend, which makes all logits at
    once, has no use for `compact` and `chunk_tokens`: they change memory and time, no result. `options` are those of
    `ppo_loss`, without `entropy`; `values=` is for a value model of its own and excludes `value_weight`.

    Raises:
        ValueError: as `linear_token_logprobs` and `ppo_loss`; `compact=True` while a CUDA graph is captured, `False` on CPU.
    """
    temperature = checks.constant(temperature)
    args = PPOArguments.parse("linear_ppo_loss", options)
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_head(hidden, weight, ids, bias, temperature, softcap, logit_scale, mask, chunk_tokens)
    made = {"value_head": value_weight is not None, "entropy_made": True}
    args.check(ids, old_logprobs, advantages, mask, name="ids", **made)
    check_value_head(hidden, value_weight, value_bias)
    if not (compact is None or compact is True or compact is False):
        raise ValueError(f"compact: got {compact!r}, expected None, True or False")
    chosen = resolve("linear_ppo_loss", backend, hidden, len(weight))
    if chosen == "reference":
        return reference.linear_ppo_loss(
            hidden,
            weight,
            ids.long(),
            old_logprobs,
            advantages,
            mask,
            bias=bias,
            value_weight=value_weight,
            value_bias=value_bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            **args.options(),
        )
    per_row = flat(temperature) if isinstance(temperature, Tensor) else None
    values = None if args.values is None else args.values.float().reshape(-1)
    differentiable = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, value_weight, value_bias, values)
    loss, metrics = LinearPpoLoss.apply(
        *differentiable,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in differentiable],
        ids.reshape(-1).long(),
        per_row,
        1.0 if per_row is not None else float(temperature),
        softcap,
        float(logit_scale),
        chunk_tokens,
        check_compact(compact, hidden, chosen),
        flat(args.old_values),
        flat(args.returns),
        *ObjectiveTerms.of(args, old_logprobs, advantages, mask).pack(),
        chosen,
    )
    return as_loss(loss, metrics)


def check_compact(compact: bool | None, hidden: Tensor, backend: str) -> bool:
    """Whether rows without a gradient are left out of the products."""
    if backend == "cpu":
        if compact is False:
            raise ValueError("compact: got False, expected None or True: on CPU those rows are always left out")
        return True
    if compact and hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("compact: got True while a CUDA graph is captured, expected None: it waits for the device")
    return bool(compact)


def check_value_head(hidden: Tensor, value_weight: Tensor | None, value_bias: Tensor | None) -> None:
    if value_weight is not None:
        checks.tensor("value_weight", value_weight, like=hidden, expected=hidden.shape[-1:], what="[H]")
    if value_bias is not None:
        if value_weight is None:
            raise ValueError("value_bias: got a tensor without value_weight, expected both or neither")
        checks.tensor("value_bias", value_bias, like=hidden, expected=(), what="a scalar")


def _forward(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    values: Tensor | None,
    needs: list[bool],  # a gradient, each of the six above
    ids: Tensor,  # (N,)
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_tokens: int | None,
    compact: bool,
    old_values: Tensor | None,
    returns: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    row_weight: Tensor | None,
    mask: Tensor,
    value_mask: Tensor,
    value_row_weight: Tensor | None,
    denominators: Tensor,  # (5,)
    cu_seqlens: Tensor | None,
    numbers: list[float],
    kinds: str,
    num_sequences: int,
    length: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    constants = (old_logprobs, advantages, weights, ref_logprobs, row_weight, mask, value_mask, value_row_weight)
    terms = ObjectiveTerms.unpack(*constants, denominators, cu_seqlens, numbers, kinds, num_sequences, length)
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    n, launch = len(ids), kernels(backend)
    plan = Plan.of(n, len(weight), hidden.dtype, backend, chunk_tokens, compact)
    rows = HeadRows.of(hidden, ids, transform, mask, gather=plan.compact)
    if value_weight is not None:
        values = value_forward(hidden, value_weight, value_bias, terms.value_mask)
    head = Head(weight, bias)
    targets = (None if x is None else x.contiguous() for x in (values, old_values, returns))
    needs_head = tuple(needs[:3])
    if terms.sequence_level:
        stats = head_stats(launch, head, rows, plan)
        slopes, sums = _finish_rows(launch, terms, rows, stats, n, *targets)
        entropy_slope = rows.take(terms.entropy_slope())
        slope = rows.take(slopes[0])
        results = given_pass(launch, head, rows, stats, slope, entropy_slope, n, plan, needs_head)
    else:
        stats, results = ppo_pass(launch, head, rows, terms.ppo, n, plan, needs_head)
        slopes, sums = _finish_rows(launch, terms, rows, stats, n, *targets)
    value_gradients = _value_backward(hidden, value_weight, slopes[1], results[0], terms, needs)
    gradients = (*results, *value_gradients)
    loss = terms.loss(sums, valued=values is not None)
    return loss, terms.metrics(sums), *(hidden.new_empty(0) if g is None else g for g in gradients)


def _finish_rows(kernels: Kernels, terms: ObjectiveTerms, rows: HeadRows, stats, n: int, values, old_values, returns):
    logprobs, entropy = rows.spread(stats.buffer[:2], n)
    *slopes, sums = terms.sums(kernels, logprobs, entropy, values, old_values, returns)
    return slopes, sums


def value_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """`hidden @ weight + bias` in float32, (N,); masked rows may hold anything and are not looked at."""
    w = weight.float()
    with torch.autocast(hidden.device.type, enabled=False):  # which would round this product
        values = torch.cat([rows @ w for rows in _float_rows(hidden, mask)]) if len(hidden) else w.new_empty(0)
    return values if bias is None else values + bias.float()


def _float_rows(hidden: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """Hidden states in float32, a few rows at a time instead of a copy of all; zeros where the mask is False."""
    for rows, counts in zip(hidden.split(VALUE_ROWS), mask.split(VALUE_ROWS), strict=True):
        yield torch.where(counts[:, None], rows, 0).float()


def _value_backward(hidden, weight, slope, d_hidden, terms: ObjectiveTerms, needs):
    """Gradients of value weight, value bias and values; the value head's part of `d_hidden` is added to it.

    `d_hidden` is divided by the policy's denominator later on, so what it gets here is multiplied by it.
    """
    slope = slope * (terms.vf_coef / terms.denominators[1])
    if weight is None:
        return None, None, slope if needs[5] else None
    if d_hidden is not None:
        d_hidden.addr_(slope * terms.denominators[0], weight.float())
    d_weight = None
    if needs[3]:
        pieces = zip(slope.split(VALUE_ROWS), _float_rows(hidden, terms.value_mask), strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            d_weight = sum((s @ h for s, h in pieces), torch.zeros(len(weight), device=weight.device))
    return d_weight, slope.double().sum().float() if needs[4] else None, None


def _fake(hidden, weight, bias, value_weight, value_bias, values, needs, ids, *rest):
    def gradient(x, needed: bool, dtype: torch.dtype):
        return hidden.new_empty(x.shape if needed else (0,), dtype=dtype)

    f32 = torch.float32
    plan = Plan.of(ids.numel(), len(weight), hidden.dtype, rest[-1], rest[4], rest[5])
    dtypes = (f32, plan.sum_dtype, f32, f32, f32, f32)
    inputs = zip((hidden, weight, bias, value_weight, value_bias, values), needs, dtypes, strict=True)
    return (
        hidden.new_empty((), dtype=f32),
        hidden.new_empty(len(METRICS), dtype=f32),
        *(gradient(*one) for one in inputs),
    )


class LinearPpoLoss(torch.autograd.Function):
    """Keeps the gradients that the forward pass made, and scales them when the upstream gradient is known."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, metrics, *gradients = _op(*inputs)
        ctx.needs, denominators, ctx.backend = inputs[6], inputs[-7], inputs[-1]
        ctx.save_for_backward(denominators, *gradients)
        ctx.dtypes = [None if x is None else gradient_dtype(x) for x in inputs[:6]]
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_loss, _):
        nothing = (None,) * 25
        if grad_loss is None:
            return *(None,) * 6, *nothing
        if torch.is_grad_enabled() and checks.is_eager(
            grad_loss
        ):  # create_graph=True: the gradients are no function here
            refuse(ctx)
        denominators, *gradients = ctx.saved_tensors
        scale = grad_loss / denominators[0]
        results = []
        for i, (gradient, dtype, needed) in enumerate(zip(gradients, ctx.dtypes, ctx.needs, strict=True)):
            results.append(scaled(gradient, scale if i < 3 else grad_loss, dtype, ctx.backend) if needed else None)
        return *results, *nothing


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """`gradient * scale`, rounded once to `dtype`; in its own bytes where it can, which makes a second backward raise."""
    if not checks.is_eager(gradient) or dtype not in _native.DTYPES:
        return (gradient.float() * scale).to(dtype)
    with torch.no_grad():
        result = kernels(backend).scale_cast(gradient, scale.float(), dtype)
    torch.autograd.graph.increment_version(gradient)
    return result


_op = define(schema_of("linear_ppo_loss", _forward), run=_forward, fake=_fake)
