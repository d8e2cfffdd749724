# pyright: reportUnknownMemberType=false
# torch does not declare the types of `Tensor.register_hook` and `torch.compiler.disable`.
"""A user's own objective: the loss of each token, and by autograd the coefficient of each row.

The fused kernels compute the other parts of the loss, and these coefficients are added to theirs. The head's gradient is the
same for every objective with the same coefficients.

Legend: N tokens.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .._options import ObjectiveFunction, PPOArguments
from . import checks


class Evaluated(NamedTuple):
    """The policy term of a custom objective."""

    total: Tensor  # (), float64: the weighted sum of the losses
    coefficients: Tensor  # (N,), float32: d total / d log-prob; where the mask is False it is not used, and may be NaN


def name_of(function: ObjectiveFunction) -> str:
    """Return the name of the function in error messages."""
    return getattr(function, "__name__", type(function).__name__)


def check_inputs(tensors: Mapping[str, Tensor], like: checks.Like) -> None:
    """Check that `objective_inputs` maps names to tensors with one entry per token, of any dtype."""
    if not isinstance(tensors, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"objective_inputs: got {type(tensors).__name__}, expected a dict of tensors")
    for name, x in tensors.items():
        given = (x.dtype,) if isinstance(x, Tensor) else ()  # pyright: ignore[reportUnnecessaryIsInstance]
        checks.tensor(f"objective_inputs[{name!r}]", x, **like, dtypes=given)


def checked(function: ObjectiveFunction, mask: Tensor) -> ObjectiveFunction:
    """Return `function` with checks of its result and derivative; `mask` (N,) selects the tokens that count."""
    name = name_of(function)

    def check_slope(slope: Tensor) -> None:
        _check_finite(f"{name} has the derivative", slope, mask)

    def call(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, **tensors: Tensor) -> Tensor:
        if logprobs.requires_grad:
            logprobs = logprobs.view_as(logprobs)
            logprobs.register_hook(check_slope)
        loss = function(logprobs, old_logprobs, advantages, **tensors)
        _check_loss(name, loss, logprobs, mask)
        return loss

    return call


def _check_loss(name: str, loss: Tensor, logprobs: Tensor, mask: Tensor) -> None:
    expected = f"expected one loss per token, {checks.shape(logprobs)}"
    if not isinstance(loss, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"objective: {name} returned {type(loss).__name__}, {expected}")
    if loss.dim() == 0:
        raise ValueError(
            f"objective: {name} returned a scalar, {expected}; leave out the reduction, which is what aggregation does"
        )
    if loss.shape != logprobs.shape:
        raise ValueError(f"objective: {name} returned shape {checks.shape(loss)}, {expected}")
    if not loss.is_floating_point():
        raise ValueError(f"objective: {name} returned {loss.dtype}, expected a floating point tensor")
    if torch.is_grad_enabled() and logprobs.requires_grad and not loss.requires_grad:
        raise ValueError(
            f"objective: the result of {name} does not depend on logprobs; use its first argument, undetached"
        )
    _check_finite(f"{name} returned", loss, mask)


def _check_finite(what: str, x: Tensor, mask: Tensor) -> None:
    """Raise ValueError for a non-finite entry under the mask. On a GPU the host would wait, and NaN reaches the loss."""
    if not checks.values_visible(x):
        return
    wrong = mask & ~x.isfinite()
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(f"objective: {what} {x[first].item()} for token {first}, expected finite numbers")


def _evaluate(
    function: ObjectiveFunction,
    tensors: Mapping[str, Tensor],
    logprobs: Tensor,  # (N,), float32
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weight: Tensor | None,  # (N,), float32; None: 1
) -> Evaluated:
    """Return the weighted sum of the losses and its derivatives.

    The function receives flat tensors, with zeros where the mask is False: their values may be anything, and must not reach the
    result through an operation over tokens.
    """
    with torch.inference_mode(False), torch.enable_grad():

        def counted(x: Tensor) -> Tensor:
            return torch.where(mask, x.detach().reshape(-1), torch.zeros((), dtype=x.dtype, device=x.device))

        leaf = counted(logprobs).requires_grad_()
        extra = {name: counted(x) for name, x in tensors.items()}
        loss = checked(function, mask)(leaf, counted(old_logprobs), counted(advantages), **extra)
        factor = mask.float() if weight is None else counted(weight)
        loss = torch.where(mask, loss.float(), 0)
        slope = cast(Tensor | None, torch.autograd.grad(loss, leaf, factor, allow_unused=True)[0])
    if slope is None:
        raise ValueError(
            f"objective: the result of {name_of(function)} does not depend on logprobs; use its first argument"
        )
    return Evaluated((loss.detach().double() * factor).sum(), slope)


evaluate: Callable[..., Evaluated] = cast(Callable[..., Evaluated], torch.compiler.disable(_evaluate))
"""`_evaluate`, which a compiler runs eagerly: it cannot trace the derivative of a function within a graph."""


def weighted(
    args: PPOArguments,
    logprobs: Tensor | None,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,  # (N,), bool
    row_weight: Tensor | None,  # (N,), float32
) -> Evaluated:
    """Return the sum of the losses of a function, weighted by `weights` and `row_weight`, and its derivatives, 0 elsewhere."""
    assert callable(args.objective) and logprobs is not None
    weight = row_weight
    if args.weights is not None:
        weights = checks.flat(args.weights)
        weight = weights if row_weight is None else weights * row_weight
    constants = logprobs.reshape(-1).float(), old_logprobs.float(), advantages.float(), mask
    total, slope = evaluate(args.objective, args.objective_inputs or {}, *constants, weight)
    return Evaluated(total, torch.where(mask, slope, 0))
