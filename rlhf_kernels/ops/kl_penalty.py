# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# torch does not declare the type of `Function.apply`.
"""Estimators of KL(policy || reference) per token."""

from typing import Any, cast

import torch
from torch import Tensor

from .._options import KL_ESTIMATORS
from ..backend import define, kernels, refuse, resolve
from . import checks


def kl_penalty(
    logprobs: Tensor,  # any shape
    ref_logprobs: Tensor,  # same shape
    *,
    estimator: str = "k1",
    backend: str = "auto",
) -> Tensor:
    """Return an estimate of KL(policy || reference) per sampled token, in float32.

        k1 = d,   k2 = d² / 2,   k3 = exp(-d) - 1 + d,   abs = |d|

    where `d = logprobs - ref_logprobs`. k1 and k3 are unbiased and k3 is never negative; k2 is biased with a low
    variance. The result is differentiable in `logprobs` only.

    Source: Schulman 2020, "Approximating KL divergence"; k1 is the penalty of InstructGPT, eq. 2.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown estimator.
    """
    checks.floating("logprobs", logprobs, dims=tuple(range(8)), what="any shape")
    checks.tensor("ref_logprobs", ref_logprobs, like=logprobs, expected=logprobs.shape, what="the shape of logprobs")
    checks.choice("estimator", estimator, KL_ESTIMATORS)
    logprobs, ref_logprobs = checks.widen(logprobs), checks.widen(ref_logprobs.detach())
    chosen = resolve("kl_penalty", backend, logprobs)
    if chosen == "reference":
        from .. import reference

        return reference.kl_penalty(logprobs, ref_logprobs, estimator=estimator)
    if estimator == "k1" and chosen == "cpu" and checks.is_eager(logprobs):
        return logprobs - ref_logprobs  # torch's subtraction has less overhead than any kernel of ours
    number = KL_ESTIMATORS.index(estimator)
    if not checks.is_eager(logprobs):
        return _op(logprobs, ref_logprobs, number, chosen)
    if torch.is_grad_enabled() and logprobs.requires_grad:
        return cast(Tensor, _Penalty.apply(logprobs, ref_logprobs, number, chosen))
    return _run(logprobs, ref_logprobs, number, chosen)


def _run(logprobs: Tensor, ref_logprobs: Tensor, estimator: int, backend: str) -> Tensor:
    return kernels(backend).kl_penalty(checks.dense(logprobs), checks.dense(ref_logprobs), estimator)


def _run_backward(grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: int, backend: str) -> Tensor:
    return kernels(backend).kl_penalty_backward(
        checks.dense(grad), checks.dense(logprobs), checks.dense(ref_logprobs), estimator
    )


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logprobs, ref_logprobs, ctx.estimator, ctx.backend = inputs
    ctx.save_for_backward(logprobs, ref_logprobs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _backward_op(grad, *ctx.saved_tensors, ctx.estimator, ctx.backend), None, None, None


_backward_op = define(
    "kl_penalty_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, int estimator, str backend) -> Tensor",
    run=_run_backward,
    fake=_fake,
    backward=refuse,
)
_op = define(
    "kl_penalty(Tensor logprobs, Tensor ref_logprobs, int estimator, str backend) -> Tensor",
    run=_run,
    fake=_fake,
    save=_save,
    backward=_differentiate,
)


class _Penalty(torch.autograd.Function):
    """The differentiable op for tensors with data, at half of the overhead of a registered one."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, ref_logprobs: Tensor, estimator: int, backend: str) -> Tensor:
        _save(ctx, (logprobs, ref_logprobs, estimator, backend), None)
        return _run(logprobs, ref_logprobs, estimator, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # the op refuses a second derivative
            return _differentiate(ctx, grad)
        logprobs, ref_logprobs = ctx.saved_tensors
        return _run_backward(grad, logprobs, ref_logprobs, ctx.estimator, ctx.backend), None, None, None
