# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Function.apply`.
"""`logits_ppo_loss` by the CUDA kernel that reads a row of logits once and writes its gradient once, in the forward pass."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._options import PPOArguments
from ..backend import OnePassKernels, define_record, flatten, kernels, names_of, refuse, unflatten
from ..launch_args import METRICS, LogitRows, PPOLoss, RowStats, Transform
from . import checks
from .objective import ObjectiveTerms, as_loss
from .token_logprobs import as_rows, overwritable


class Inputs(NamedTuple):
    """The arguments of the registered op."""

    logits: Tensor  # (N, V) or (B, T, V)
    values: Tensor | None  # (N,)
    needs: list[bool]  # a gradient, logits and values
    inplace: bool
    ids: Tensor  # (N,)
    transform: Transform
    old_values: Tensor | None  # (N,)
    returns: Tensor | None  # (N,)
    terms: ObjectiveTerms

    def rows(self) -> LogitRows:
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
    """Compute the loss by the CUDA kernel, for arguments that were checked; token-level ratios only.

    The gradient is computed with the loss, for an upstream gradient of 1; backward scales it once for another one.
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
    return as_loss(loss, metrics)


def why_two_passes(args: PPOArguments, logits: Tensor, inplace: bool) -> str:
    """Return why the gradient cannot be computed before the upstream gradient is known; empty when it can."""
    if args.ratio_level != "token":
        return (
            f"got ratio_level={args.ratio_level!r}, expected 'token', where a row's own log-prob decides its gradient"
        )
    if inplace and logits.dtype == torch.float16:
        # What a loss scale would lift is 0 by then, and the logits are gone.
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
        logits.new_empty(len(METRICS), dtype=f32),
        logits.new_empty(logits.shape if x.needs[0] else (0,)),
        logits.new_empty((4, n), dtype=f32),
        logits.new_empty((2, n), dtype=f32),
        logits.new_empty((0,) if x.values is None else (n,), dtype=f32),
    )


class OnePass(torch.autograd.Function):
    """Keeps the gradients that the forward pass computed; backward scales them where the upstream gradient is not 1."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, Tensor]:
        inputs = unflatten(Inputs, flat)
        loss, metrics, gradient, stats, coefficients, value_slope = _forward(inputs) if inputs.inplace else _op(*flat)
        if inputs.inplace:
            # The version tells autograd that the logits are gone, so that a second use of them raises.
            torch.autograd.graph.increment_version(inputs.logits)
        ctx.inplace, ctx.needs = inputs.inplace, inputs.needs
        kept = inputs._replace(logits=None if inputs.inplace else inputs.logits, values=None)
        tensors, ctx.rest = _tensors_apart(flatten(kept))
        ctx.save_for_backward(gradient, stats, coefficients, value_slope, *tensors)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one gradient per output
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradients: dict[str, Tensor | None] = dict.fromkeys(NAMES)
        if grad_loss is None:
            return tuple(gradients.values())
        if torch.is_grad_enabled() and checks.is_eager(grad_loss):
            refuse(ctx)  # create_graph=True: the gradients are constants
        gradient, stats, coefficients, value_slope, *tensors = ctx.saved_tensors
        inputs = unflatten(Inputs, _tensors_back(tensors, ctx.rest))
        if ctx.inplace:
            inputs = inputs._replace(logits=gradient)
        of_logits, of_values = ctx.needs
        if of_logits:
            gradients["logits"] = _scaled(inputs, gradient, stats, coefficients, grad_loss.float())
        if of_values:
            gradients["values"] = value_slope * grad_loss
        return tuple(gradients.values())


def _tensors_apart(flat: tuple[Any, ...]) -> tuple[list[Tensor], list[Any]]:
    """Return the tensors, and the other values with None in the places of tensors; autograd stores tensors separately."""
    return [x for x in flat if isinstance(x, Tensor)], [None if isinstance(x, Tensor) else (x,) for x in flat]


def _tensors_back(tensors: list[Tensor], rest: list[Any]) -> tuple[Any, ...]:
    """The inverse of `_tensors_apart`."""
    following = iter(tensors)
    return tuple(next(following) if x is None else x[0] for x in rest)


def _scaled(x: Inputs, gradient: Tensor, stats: Tensor, coefficients: Tensor, upstream: Tensor) -> Tensor:
    """Return the gradient for another upstream gradient than 1, in its own bytes, which makes a second backward raise."""
    if not checks.is_eager(gradient):
        return (gradient.float() * upstream).to(gradient.dtype)
    with torch.no_grad():
        _launchers().rescale_dlogits(x.rows(), x.terms.ppo, RowStats(stats), coefficients, gradient, upstream)
    torch.autograd.graph.increment_version(gradient)
    return gradient.detach()


_op = define_record("logits_ppo_loss", Inputs, _forward, _fake)
