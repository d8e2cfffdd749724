# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Function.apply` and `Tensor.split`.
"""The PPO objective from hidden states: policy and value head in one read, three matrix products, no [N, V] tensor."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .. import _native  # pyright: ignore[reportPrivateUsage]  # of this package
from .._options import PPOOptions
from ..backend import Kernels, define_record, flatten, kernels, names_of, refuse, resolve, unflatten
from ..launch_args import METRICS, PPOLoss, RowStats, Transform
from . import checks, objective
from .head import Head, HeadRows, Plan, given_pass, head_stats, ppo_pass
from .linear_token_logprobs import check_head, gradient_dtype, under_autocast
from .objective import Denominators, ObjectiveTerms, as_loss

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
    **options: Unpack[PPOOptions],
) -> PPOLoss:
    """Return `logits_ppo_loss` of `hidden @ weight.T + bias`, and the value loss of `hidden @ value_weight + value_bias`.

    Gradients are computed in the forward pass, chunk by chunk, and scaled in backward: a second backward raises, and a
    checkpointed region would do the work twice. Masked rows enter no matrix product; rows whose log-prob and entropy
    coefficients are exactly zero (clipped, no advantage) enter none of the backward ones. On a GPU both need
    `compact=True`, because their number has to reach the host: one wait per call and one per chunk, and no graph capture;
    without it those rows are zeros in the products. On CPU they are always left out. `compact` and `chunk_tokens` change
    memory and time but no result, and the reference backend, which computes all logits at once, ignores them. `options` are
    those of `ppo_loss`, without `entropy`; `values=` is for a separate value model and excludes `value_weight`.

    Raises:
        ValueError: as `linear_token_logprobs` and `ppo_loss`; `compact=True` while a CUDA graph is captured, `False` on CPU.
    """
    temperature = checks.constant(temperature)
    args = objective.parse("linear_ppo_loss", options)
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_head(hidden, weight, ids, bias, temperature, softcap, logit_scale, mask, chunk_tokens)
    computed = {"value_head": value_weight is not None, "computes_entropy": True}
    objective.check(args, ids, old_logprobs, advantages, mask, name="ids", **computed)
    check_value_head(hidden, value_weight, value_bias)
    if not (compact is None or compact is True or compact is False):
        raise ValueError(f"compact: got {compact!r}, expected None, True or False")
    chosen = resolve("linear_ppo_loss", backend, hidden, len(weight))
    if chosen == "reference":
        from .. import reference

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
            **objective.as_options(args),
        )
    values = None if args.values is None else args.values.float().reshape(-1)
    leaves = Leaves(hidden.reshape(-1, hidden.shape[-1]), weight, bias, value_weight, value_bias, values)
    inputs = Inputs(
        leaves,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves],
        ids.reshape(-1).long(),
        Transform.of(temperature, softcap, logit_scale),
        chunk_tokens,
        check_compact(compact, hidden, chosen),
        checks.flat(args.old_values),
        checks.flat(args.returns),
        ObjectiveTerms.of(args, old_logprobs, advantages, mask),
        chosen,
    )
    loss, metrics = LinearPpoLoss.apply(*flatten(inputs))
    return as_loss(loss, metrics)


def check_compact(compact: bool | None, hidden: Tensor, backend: str) -> bool:
    """Return whether rows without a gradient are left out of the products."""
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


class Leaves(NamedTuple):
    """The differentiable inputs."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    value_weight: Tensor | None  # (H,)
    value_bias: Tensor | None  # ()
    values: Tensor | None  # (N,)


class Inputs(NamedTuple):
    """The arguments of the registered op."""

    leaves: Leaves
    needs: list[bool]  # a gradient, each of the leaves
    ids: Tensor  # (N,)
    transform: Transform
    chunk_tokens: int | None
    compact: bool
    old_values: Tensor | None  # (N,)
    returns: Tensor | None  # (N,)
    terms: ObjectiveTerms
    backend: str

    def needed(self) -> dict[str, bool]:
        return dict(zip(Leaves._fields, self.needs, strict=True))

    def plan(self) -> Plan:
        dtype, vocab = self.leaves.hidden.dtype, len(self.leaves.weight)
        return Plan.of(self.ids.numel(), vocab, dtype, self.backend, self.chunk_tokens, self.compact)


NAMES = names_of(Inputs)


def _forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    leaves, terms, needs, values = x.leaves, x.terms, x.needed(), x.leaves.values
    hidden, n, launch, plan = leaves.hidden, len(x.ids), kernels(x.backend), x.plan()
    rows = HeadRows.of(hidden, x.ids, x.transform, terms.mask, gather=plan.compact)
    if leaves.value_weight is not None:
        values = value_forward(hidden, leaves.value_weight, leaves.value_bias, terms.value_mask)
    head = Head(leaves.weight, leaves.bias)
    targets = [None if y is None else y.contiguous() for y in (values, x.old_values, x.returns)]
    needs_head = (needs["hidden"], needs["weight"], needs["bias"])
    if terms.sequence_level:
        stats = head_stats(launch, head, rows, plan)
        slope, value_slope, sums = _objective(launch, terms, rows, stats, n, targets)
        slopes = rows.take(slope), rows.take(terms.entropy_slope())
        results = given_pass(launch, head, rows, stats, *slopes, n, plan, needs_head)
    else:
        stats, results = ppo_pass(launch, head, rows, terms.ppo, n, plan, needs_head)
        _, value_slope, sums = _objective(launch, terms, rows, stats, n, targets)
    gradients = (*results, *_value_backward(leaves, value_slope, results[0], terms, needs))
    d_hidden, d_weight, d_bias, d_value_weight, d_value_bias, d_values = (
        hidden.new_empty(0) if g is None else g for g in gradients
    )
    loss = terms.loss(sums, valued=values is not None)
    return loss, terms.metrics(sums), d_hidden, d_weight, d_bias, d_value_weight, d_value_bias, d_values


def _objective(
    kernels: Kernels, terms: ObjectiveTerms, rows: HeadRows, stats: RowStats, n: int, targets: list[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return slopes and sums of all N tokens from the statistics of the rows; `targets`: values, old values, returns."""
    logprobs, entropy = rows.spread(stats.buffer[:2], n)
    return terms.sums(kernels, logprobs, entropy, *targets)


def value_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Return `hidden @ weight + bias` in float32, (N,); masked rows may hold anything and count as zeros."""
    w = weight.float()
    with torch.autocast(hidden.device.type, enabled=False):  # which would round this product
        values = torch.cat([rows @ w for rows in _float_rows(hidden, mask)]) if len(hidden) else w.new_empty(0)
    return values if bias is None else values + bias.float()


def _float_rows(hidden: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """Yield hidden states in float32, a few rows at a time instead of a copy of all; zeros where the mask is False."""
    for rows, counts in zip(hidden.split(VALUE_ROWS), mask.split(VALUE_ROWS), strict=True):
        yield torch.where(counts[:, None], rows, 0).float()


def _value_backward(
    leaves: Leaves, slope: Tensor, d_hidden: Tensor | None, terms: ObjectiveTerms, needs: dict[str, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of value weight, value bias and values; add the value head's part to `d_hidden`.

    `d_hidden` is divided by the policy's denominator later, so the part is multiplied by it here.
    """
    hidden, weight, d = leaves.hidden, leaves.value_weight, terms.denominators
    slope = slope * (terms.vf_coef / d.value)
    if weight is None:
        return None, None, slope if needs["values"] else None
    if d_hidden is not None:
        d_hidden.addr_(slope * d.policy, weight.float())
    d_weight = None
    if needs["value_weight"]:
        pieces = zip(slope.split(VALUE_ROWS), _float_rows(hidden, terms.value_mask), strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            d_weight = sum((s @ h for s, h in pieces), torch.zeros(len(weight), device=weight.device))
    return d_weight, slope.double().sum().float() if needs["value_bias"] else None, None


def _fake(x: Inputs) -> tuple[Tensor, ...]:
    hidden, f32, needs = x.leaves.hidden, torch.float32, x.needed()
    gradients = [
        hidden.new_empty(leaf.shape if needs[name] else (0,), dtype=x.plan().sum_dtype if name == "weight" else f32)
        for name, leaf in x.leaves._asdict().items()
    ]
    return hidden.new_empty((), dtype=f32), hidden.new_empty(len(METRICS), dtype=f32), *gradients


class LinearPpoLoss(torch.autograd.Function):
    """Keeps the gradients that the forward pass computed, and scales them when the upstream gradient is known."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, Tensor]:
        inputs = unflatten(Inputs, flat)
        loss, metrics, *gradients = _op(*flat)
        ctx.needs, ctx.backend = inputs.needs, inputs.backend
        ctx.save_for_backward(inputs.terms.stacked_denominators, *gradients)
        ctx.dtypes = [None if x is None else gradient_dtype(x) for x in inputs.leaves]
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one gradient per output
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        results: dict[str, Tensor | None] = dict.fromkeys(NAMES)
        if grad_loss is None:
            return tuple(results.values())
        if torch.is_grad_enabled() and checks.is_eager(grad_loss):
            refuse(ctx)  # create_graph=True: the gradients are constants
        denominators, *gradients = ctx.saved_tensors
        of_head = grad_loss / Denominators(*denominators).policy  # not divided yet, see HeadGradients
        for name, gradient, dtype, needed in zip(Leaves._fields, gradients, ctx.dtypes, ctx.needs, strict=True):
            if needed:
                scale = of_head if name in ("hidden", "weight", "bias") else grad_loss
                results[name] = scaled(gradient, scale, dtype, ctx.backend)
        return tuple(results.values())


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Return `gradient * scale`, rounded once to `dtype`; in its bytes where possible, so that a second backward raises."""
    if not checks.is_eager(gradient) or dtype not in _native.DTYPES:
        return (gradient.float() * scale).to(dtype)
    with torch.no_grad():
        result = kernels(backend).scale_cast(gradient, scale.float(), dtype)
    torch.autograd.graph.increment_version(gradient)
    return result


_op = define_record("linear_ppo_loss", Inputs, _forward, _fake)
