# pyright: reportUnknownMemberType=false
# torch does not declare the types of `Function.apply`.
"""`ppo_loss` of eager CPU tensors in one call of the extension, without a registered op.

For a small batch, checks and dispatch cost more than the arithmetic. One C++ call counts the tokens and computes
loss, metrics and gradients. Compiled graphs, GPUs, functions as objective and losses other than the objective take the path of
`ops/ppo_loss.py`, which gives the same bits.

Legend: B sequences, T positions, N tokens.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import _native  # pyright: ignore[reportPrivateUsage]  # of this package
from .._options import PPOArguments
from ..backend import choose, refuse
from ..launch_args import METRICS, SUMS, Aggregation, PPOLoss, Sequences, count
from . import checks, objective
from .scalars import scalars_of

COUNTED = -1.0
"""Denominator that is the number of tokens under the mask."""


def serves(args: PPOArguments, logprobs: Tensor) -> bool:
    """Return whether the call has one mask per loss and data that the extension can read."""
    plain = args.term is None and args.term_weights is None and args.nll_mask is None
    return plain and not callable(args.objective) and checks.is_eager(logprobs)


def serves_values(values: Tensor, others: tuple[Tensor | None, ...], mask: Tensor) -> bool:
    """Return whether the tensors of a value term, (B, T), need no more checks and the extension can read them."""
    return (
        checks.is_eager(values)
        and choose("ppo_loss", values.device, values.dtype).backend == "cpu"
        and values.dim() == 2
        and all(x is None or (x.dtype is values.dtype and x.shape == values.shape and x.is_cpu) for x in others)
        and mask.shape == values.shape
    )


def direct_ppo_loss(
    logprobs: Tensor, args: PPOArguments, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> PPOLoss:
    """Return the loss from checked arguments."""
    loss, metrics = loss_and_metrics(logprobs, args, old_logprobs, advantages, mask)
    return PPOLoss(loss, dict(zip(METRICS, metrics.unbind(), strict=True)))


def loss_and_metrics(
    logprobs: Tensor | None,  # (B, T) or (N,), differentiable; None: there is no policy term
    args: PPOArguments,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the metrics in the order of METRICS; without log-probs, `mask` is that of the value term."""
    leaves = [None if x is None else _float(x) for x in (logprobs, args.entropy, args.values)]
    metrics = torch.empty(len(METRICS))

    def run(*leaves: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        return _run(args, old_logprobs, advantages, mask, metrics, *leaves)

    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves):
        loss = cast(Tensor, Direct.apply(run, *leaves))
    else:
        loss = run(*leaves)[0]
    return loss, metrics


def _float(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 else x.float()


class Direct(torch.autograd.Function):
    """Autograd function that computes the gradients in forward and scales them by the upstream gradient in backward."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, list[Tensor | None]]], *leaves: Tensor | None) -> Tensor:
        """Return the loss; save the gradients."""
        loss, slopes = run(*leaves)
        ctx.save_for_backward(*slopes)
        return loss

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one gradient per output
        ctx: Any, grad_loss: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the saved gradients times the upstream gradient."""
        if torch.is_grad_enabled():
            refuse(ctx)  # create_graph=True: the saved gradients are constants
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(slope * grad_loss if slope is not None and needed else None for slope, needed in pairs)


def _denominators(args: PPOArguments, mask: Tensor, value_mask: Tensor, sequences: Sequences) -> tuple[Any, ...]:
    """Return the row weights of the policy and of the value term, and the four denominators of the extension."""
    tokens, value_tokens = (
        COUNTED if x is None else float(count(mask, x)) for x in (args.num_tokens, args.num_value_tokens)
    )
    if args.aggregation == "token_mean":
        return None, None, COUNTED, COUNTED, tokens, value_tokens
    if args.aggregation == "token_sum":
        return None, None, 1.0, 1.0, tokens, value_tokens
    one = torch.ones(())
    of = [
        Aggregation.of(args.aggregation, x.reshape(-1), sequences, one, args.num_sequences) for x in (mask, value_mask)
    ]
    return *(x.row_weight for x in of), *(float(x.denominator) for x in of), tokens, value_tokens


def _run(
    args: PPOArguments,
    old_logprobs: Tensor | None,
    advantages: Tensor | None,
    mask: Tensor,
    metrics: Tensor,
    logprobs: Tensor | None,
    entropy: Tensor | None,
    values: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss and the gradients by log-probs, entropy and values; write the metrics."""
    scalars, held = scalars_of(args), list[Tensor]()

    def address(x: Tensor | None) -> int:
        if x is None:
            return 0
        if not (x.dtype in (torch.float32, torch.bool) and x.is_contiguous()):
            x = x.contiguous() if x.dtype is torch.bool else x.float().contiguous()
            held.append(x)
        return x.data_ptr()

    sequences = Sequences.of(mask, args.cu_seqlens)
    sequences.check(mask.numel())
    value_mask = mask if args.value_mask is None else args.value_mask
    row_weight, value_row_weight, *denominators = _denominators(args, mask, value_mask, sequences)
    source, divisor = objective.metric_places(metrics.device, METRICS, SUMS)
    with_entropy = entropy is not None and args.entropy_coef != 0
    pairs = (logprobs, logprobs is not None), (entropy, with_entropy), (values, values is not None)
    slopes = [torch.empty(x.shape) if x is not None and on else None for x, on in pairs]
    result = torch.empty(())
    _native.extension().ppo_loss_call(
        _native.ppo_scalars(scalars),
        mask.numel(),
        sequences.count,
        sequences.length,
        0 if sequences.cu_seqlens is None else sequences.cu_seqlens.data_ptr(),
        objective.sequence_level(args),
        *map(address, (logprobs, old_logprobs, advantages, mask, args.weights, args.ref_logprobs, row_weight)),
        *map(address, (entropy, values, args.old_values, args.returns, value_mask, value_row_weight)),
        *denominators,
        args.vf_coef,
        args.entropy_coef,
        args.kl_coef,
        source.data_ptr(),
        divisor.data_ptr(),
        len(METRICS),
        *map(address, slopes),
        result.data_ptr(),
        metrics.data_ptr(),
    )
    return result, slopes
