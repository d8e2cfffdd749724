# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Function.apply`.
"""`logits_ppo_loss` with the CUDA kernel that reads each row of logits once and writes its gradient in the forward pass."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._options import PPOArguments
from ..backend import OnePassKernels, define_record, kernels, refuse
from ..launch_args import (
    LogitRows,
    PPOLoss,
    RowStats,
    Transform,
    flatten,
    names_of,
    tensors_apart,
    tensors_back,
    unflatten,
)
from . import checks
from .objective import ObjectiveTerms, as_loss, sequence_level
from .token_logprobs import as_rows, overwritable


class Inputs(NamedTuple):
    """The arguments of the registered op."""

    logits: Tensor  # (N, V) or (B, T, V)
    values: Tensor | None  # (N,)
    needs: list[bool]  # whether logits and values need a gradient
    inplace: bool
    ids: Tensor  # (N,)
    transform: Transform
    old_values: Tensor | None  # (N,)
    returns: Tensor | None  # (N,)
    terms: ObjectiveTerms

    def rows(self) -> LogitRows:
        """Return the rows of logits as the kernels expect them."""
        return LogitRows(self.logits, self.ids.contiguous(), self.transform, self.terms.mask)


NAMES = names_of(Inputs)


def fused_logits_ppo_loss(
    logits: Tensor,
    ids: Tensor,
    transform: Transform,
    args: PPOArguments,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    inplace: bool,
) -> PPOLoss:
    """Return the loss, computed by the CUDA kernel from checked arguments; ratios are of tokens.

    The gradient is computed with the loss, for an upstream gradient of 1. Backward scales it by the upstream gradient.
    """
    values = None if args.values is None else args.values.float().reshape(-1)
    rows = as_rows(logits)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (rows, values)]
    inputs = Inputs(
        rows,
        values,
        needs,
        inplace and needs[0] and overwritable(rows),
        ids.reshape(-1).long(),
        transform,
        checks.flat(args.old_values),
        checks.flat(args.returns),
        ObjectiveTerms.of(args, old_logprobs, advantages, mask),
    )
    loss, metrics = OnePass.apply(*flatten(inputs))
    return as_loss(loss, metrics, inputs.terms)


def why_two_passes(args: PPOArguments, logits: Tensor, inplace: bool) -> str:
    """Return why the gradient cannot be computed in the forward pass; empty if it can."""
    if callable(args.objective):
        return (
            "got a function as objective, expected a name, because the kernel has the formulas of the named ones only"
        )
    if sequence_level(args):
        got = f"objective={args.objective!r}" if args.ratio_level == "token" else "ratio_level='sequence'"
        return f"got {got}, expected a ratio per token, because the kernel computes gradients row by row"
    for name in ("term", "nll_mask"):
        if getattr(args, name) is not None:
            return f"got {name}, expected None, because the kernel computes the objective only"
    if inplace and logits.dtype == torch.float16:
        # Gradients that need a loss scale would underflow to 0 before it is applied, and the overwritten logits could not
        # be used to compute them again.
        return "got inplace=True with float16 logits, expected inplace=False"
    return ""


def _launchers() -> OnePassKernels:
    return cast(OnePassKernels, kernels("cuda"))


def _forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logits, terms, d = x.logits, x.terms, x.terms.denominators
    stats = RowStats.empty(x.ids.numel(), x.ids.device)
    coefficients = torch.empty_like(stats.buffer[:2])
    out = None
    if x.needs[0]:
        out = logits if x.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launchers().logits_ppo_loss(x.rows(), terms.ppo, stats, coefficients, d.policy, out)
    targets = (None if y is None else y.contiguous() for y in (x.values, x.old_values, x.returns))
    _, value_slope, sums = terms.sums(kernels("triton"), stats.logprobs, stats.entropy, *targets)
    return (
        terms.loss(sums, valued=x.values is not None),
        terms.metrics(sums),
        logits.new_empty(0) if out is None else out,
        stats.buffer,
        coefficients,
        value_slope * (terms.vf_coef / d.value),
    )


def _fake(x: Inputs) -> tuple[Tensor, ...]:
    n, f32, logits = x.ids.numel(), torch.float32, x.logits
    return (
        logits.new_empty((), dtype=f32),
        logits.new_empty(x.terms.num_metrics, dtype=f32),
        logits.new_empty(logits.shape if x.needs[0] else (0,)),
        logits.new_empty((4, n), dtype=f32),
        logits.new_empty((2, n), dtype=f32),
        logits.new_empty((0,) if x.values is None else (n,), dtype=f32),
    )


class OnePass(torch.autograd.Function):
    """Autograd function that computes the gradients in forward and scales them by the upstream gradient in backward."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and the metrics; save the gradients."""
        inputs = unflatten(Inputs, flat)
        loss, metrics, gradient, stats, coefficients, value_slope = _forward(inputs) if inputs.inplace else _op(*flat)
        if inputs.inplace:
            # With a new version, autograd raises if a different op needs the overwritten logits.
            torch.autograd.graph.increment_version(inputs.logits)
        ctx.inplace, ctx.needs = inputs.inplace, inputs.needs
        kept = inputs._replace(logits=None if inputs.inplace else inputs.logits, values=None)
        tensors, ctx.rest = tensors_apart(flatten(kept))
        ctx.save_for_backward(gradient, stats, coefficients, value_slope, *tensors)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one gradient per output
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the saved gradients, scaled by the upstream gradient."""
        gradients: dict[str, Tensor | None] = dict.fromkeys(NAMES)
        if grad_loss is None:
            return tuple(gradients.values())
        if checks.is_eager(grad_loss):
            if torch.is_grad_enabled():
                refuse(ctx)  # create_graph=True: the gradients are constants
            checks.first_backward(ctx, "logits_ppo_loss")
        gradient, stats, coefficients, value_slope, *tensors = ctx.saved_tensors
        inputs = unflatten(Inputs, tensors_back(tensors, ctx.rest))
        if ctx.inplace:
            inputs = inputs._replace(logits=gradient)
        of_logits, of_values = ctx.needs
        if of_logits:
            gradients["logits"] = _scaled(inputs, gradient, stats, coefficients, grad_loss.float())
        if of_values:
            gradients["values"] = value_slope * grad_loss
        return tuple(gradients.values())


def _scaled(x: Inputs, gradient: Tensor, stats: Tensor, coefficients: Tensor, upstream: Tensor) -> Tensor:
    """Return the gradient times the upstream gradient, computed in place."""
    if not checks.is_eager(gradient):
        return (gradient.float() * upstream).to(gradient.dtype)
    with torch.no_grad():
        _launchers().rescale_dlogits(x.rows(), x.terms.ppo, RowStats(stats), coefficients, gradient, upstream)
    torch.autograd.graph.increment_version(gradient)
    return gradient.detach()


_op = define_record("logits_ppo_loss", Inputs, _forward, _fake)
