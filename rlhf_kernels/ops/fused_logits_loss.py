"""`logits_ppo_loss` by the CUDA kernel that reads a row of logits once and writes its gradient once, in the forward pass."""

import torch
from torch import Tensor

from ..backend import kernels
from ..launch_args import LogitRows, RowStats, Transform
from ..types import METRICS, PPOLoss
from . import checks
from .ppo_arguments import PPOArguments
from .ppo_terms import ObjectiveTerms, as_loss, flat
from .registry import define, refuse, schema_of
from .token_logprobs import as_rows, overwritable


def one_pass_ppo_loss(
    logits, ids, temperature, softcap, logit_scale, args: PPOArguments, old_logprobs, advantages, mask, *, inplace: bool
) -> PPOLoss:
    """The compiled form, for arguments that were checked; token-level ratios only.

    The gradient is made with the loss, for an upstream gradient of 1; another one scales it in backward, once.
    """
    per_row = flat(temperature) if isinstance(temperature, Tensor) else None
    values = None if args.values is None else args.values.float().reshape(-1)
    rows = as_rows(logits)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (rows, values)]
    loss, metrics = OnePass.apply(
        rows,
        values,
        needs,
        inplace and needs[0] and overwritable(rows),
        ids.reshape(-1).long(),
        per_row,
        1.0 if per_row is not None else float(temperature),
        softcap,
        float(logit_scale),
        flat(args.old_values),
        flat(args.returns),
        *ObjectiveTerms.of(args, old_logprobs, advantages, mask).pack(),
    )
    return as_loss(loss, metrics)


def why_two_passes(args: PPOArguments, logits: Tensor, inplace: bool) -> str:
    """Why the gradient cannot be made before the upstream gradient is known; empty when it can."""
    if args.ratio_level != "token":
        return (
            f"got ratio_level={args.ratio_level!r}, expected 'token', where a row's own log-prob decides its gradient"
        )
    if inplace and logits.dtype == torch.float16:
        # What a loss scale would lift is 0 by then, and the logits are gone.
        return "got inplace=True with float16 logits, expected inplace=False"
    return ""


def _forward(
    logits: Tensor,  # (N, V) or (B, T, V)
    values: Tensor | None,
    needs: list[bool],  # a gradient, logits and values
    inplace: bool,
    ids: Tensor,  # (N,)
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    constants = (old_logprobs, advantages, weights, ref_logprobs, row_weight, mask, value_mask, value_row_weight)
    terms = ObjectiveTerms.unpack(*constants, denominators, cu_seqlens, numbers, kinds, num_sequences, length)
    stats = RowStats.empty(ids.numel(), ids.device)
    coefficients = torch.empty_like(stats.buffer[:2])
    rows = _rows(logits, ids, terms, temperatures, temperature, softcap, logit_scale)
    out = None
    if needs[0]:
        out = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    kernels("cuda").logits_ppo_loss(rows, terms.ppo, stats, coefficients, denominators[0], out)
    targets = (None if x is None else x.contiguous() for x in (values, old_values, returns))
    _, value_slope, sums = terms.sums(kernels("triton"), stats.logprobs, stats.entropy, *targets)
    return (
        terms.loss(sums, valued=values is not None),
        terms.metrics(sums),
        logits.new_empty(0) if out is None else out,
        stats.buffer,
        coefficients,
        value_slope * (terms.vf_coef / denominators[1]),
    )


def _rows(logits, ids, terms: ObjectiveTerms, temperatures, temperature, softcap, logit_scale) -> LogitRows:
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    return LogitRows(logits, ids.contiguous(), transform, terms.mask)


def _fake(logits, values, needs, inplace, ids, *rest):
    n, f32 = ids.numel(), torch.float32
    return (
        logits.new_empty((), dtype=f32),
        logits.new_empty(len(METRICS), dtype=f32),
        logits.new_empty(logits.shape if needs[0] else (0,)),
        logits.new_empty((4, n), dtype=f32),
        logits.new_empty((2, n), dtype=f32),
        logits.new_empty((0,) if values is None else (n,), dtype=f32),
    )


class OnePass(torch.autograd.Function):
    """Keeps the gradients that the forward pass made; backward scales them where the upstream gradient is not 1."""

    @staticmethod
    def forward(ctx, *inputs):
        logits, _, ctx.needs, ctx.inplace, *rest = inputs
        run = _forward if ctx.inplace else _op
        loss, metrics, gradient, stats, coefficients, value_slope = run(*inputs)
        if ctx.inplace:
            # The version tells autograd that the logits are gone, so that a second use of them raises.
            torch.autograd.graph.increment_version(logits)
        saved = [x for x in rest if isinstance(x, Tensor)]
        ctx.rest = [None if isinstance(x, Tensor) else (x,) for x in rest]
        # Saved once: hooks that store tensors elsewhere would bring back two of what is one.
        ctx.save_for_backward(None if ctx.inplace else logits, gradient, stats, coefficients, value_slope, *saved)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_loss, _):
        nothing = (None,) * (len(ctx.rest) + 2)
        if grad_loss is None:
            return None, None, *nothing
        if torch.is_grad_enabled() and checks.is_eager(grad_loss):
            refuse(ctx)  # create_graph=True: the gradients are no function here
        logits, gradient, stats, coefficients, value_slope, *saved = ctx.saved_tensors
        logits = gradient if logits is None else logits
        tensors = iter(saved)
        rest = [next(tensors) if x is None else x[0] for x in ctx.rest]
        if ctx.needs[0]:
            gradient = _scaled(logits, gradient, stats, coefficients, grad_loss.float(), rest)
        return gradient if ctx.needs[0] else None, value_slope * grad_loss if ctx.needs[1] else None, *nothing


def _scaled(logits: Tensor, gradient: Tensor, stats: Tensor, coefficients: Tensor, upstream: Tensor, rest) -> Tensor:
    """The gradient for another upstream gradient than 1, in its own bytes, which makes a second backward raise."""
    if not checks.is_eager(gradient):
        return (gradient.float() * upstream).to(gradient.dtype)
    ids, temperatures, temperature, softcap, logit_scale, _, _, *packed = rest
    terms = ObjectiveTerms.unpack(*packed)
    rows = _rows(logits, ids, terms, temperatures, temperature, softcap, logit_scale)
    with torch.no_grad():
        kernels("cuda").rescale_dlogits(rows, terms.ppo, RowStats(stats), coefficients, gradient, upstream)
    torch.autograd.graph.increment_version(gradient)
    return gradient.detach()


_op = define(schema_of("logits_ppo_loss", _forward), run=_forward, fake=_fake)
