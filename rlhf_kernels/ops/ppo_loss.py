"""The PPO objective on log-probs that exist already."""

import torch
from torch import Tensor

from .. import reference
from ..backend import kernels, resolve
from ..types import METRICS, PPOLoss
from . import checks
from .ppo_arguments import PPOArguments
from .ppo_terms import ObjectiveTerms, as_loss, flat
from .registry import define, refuse, schema_of


def ppo_loss(
    logprobs: Tensor,  # (B, T) or (N,), differentiable
    old_logprobs: Tensor,  # (B, T) or (N,)
    advantages: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    objective: str = "clip",
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    old_kl_coef: float = 0.0,
    ratio_level: str = "token",
    weights: Tensor | None = None,
    values: Tensor | None = None,  # differentiable
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    cliprange_value: float | None = 0.2,
    vf_coef: float = 0.1,
    value_mask: Tensor | None = None,
    entropy: Tensor | None = None,  # differentiable
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    aggregation: str = "token_mean",
    num_tokens: float | Tensor | None = None,
    num_value_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # (B + 1,), int32
    backend: str = "auto",
) -> PPOLoss:
    """`L = agg(policy) - entropy_coef agg(H) + kl_coef agg(KL(policy || reference)) + vf_coef agg(value)`.

    With `r = exp(logprobs - old_logprobs)` (`ratio_level="sequence"`: the log-ratio is first averaged over the sequence's
    actions; `log_ratio_clamp` bounds it on both sides, with no gradient outside) the policy term is `weights` times

        clip:            -min(r A, clip(r, 1 - cliprange, 1 + cliprange_high) A); with `dual_clip` c at most -c A where A < 0
        kl_penalty:      -(r A - old_kl_coef KL(old || new)),  KL by k3: r - 1 - log r
        ratio:           -r A                                  (the surrogate of TRPO)
        policy_gradient: -A log π                              (REINFORCE, actor-critic)

    the value term `1/2 max((v - R)², (clip(v, old_values ± cliprange_value) - R)²)` (unclipped where either is None), and
    the KL term `kl_penalty(logprobs, ref_logprobs, estimator=kl_estimator)`.

    `aggregation` reduces each term over its own mask (value: `value_mask`, default `mask`): token_mean divides the sum by
    `num_tokens` (value: `num_value_tokens`), seq_mean_token_sum by `num_sequences`, seq_mean_token_mean by `num_sequences`
    after each token was divided by its sequence's count, token_sum by nothing. A denominator that is None is this call's
    own; with the global ones, micro-batches add up to the full batch. Nothing True gives a loss of 0, not NaN.

    `old_logprobs, advantages, weights, old_values, returns, ref_logprobs` are constants. Metrics: see `METRICS`.

    Source: Schulman et al. 2017 (PPO) eq. 6, 7, 8, 9; Ye et al. 2020 (dual clip) eq. 5; Yu et al. 2025 (DAPO, clip-higher)
    eq. 10; Zheng et al. 2025 (GSPO, sequence ratios) eq. 7; Schulman et al. 2015 (TRPO) eq. 14; Williams 1992 (REINFORCE).

    Raises:
        ValueError: a shape, dtype, device, range, choice or combination that does not fit, with the argument's name.
    """
    arguments = {
        k: v for k, v in locals().items() if k not in ("logprobs", "old_logprobs", "advantages", "mask", "backend")
    }
    args = PPOArguments(**arguments)
    checks.floating("logprobs", logprobs, dims=(1, 2), what="[B, T] or [N]")
    args.check(logprobs, old_logprobs, advantages, mask, name="logprobs")
    chosen = resolve("ppo_loss", backend, logprobs)
    if chosen == "reference":
        return reference.ppo_loss(logprobs, old_logprobs, advantages, mask, **args.options())
    return fused_ppo_loss(logprobs, entropy, args, old_logprobs, advantages, mask, chosen)


def fused_ppo_loss(logprobs, entropy, args: PPOArguments, old_logprobs, advantages, mask, backend: str) -> PPOLoss:
    """The compiled form, for arguments that were checked."""
    terms = ObjectiveTerms.of(args, old_logprobs, advantages, mask)
    differentiable = (None if x is None else x.float().reshape(-1) for x in (logprobs, entropy, args.values))
    constants = (flat(args.old_values), flat(args.returns))
    loss, metrics = Fused.apply(*differentiable, *constants, *terms.pack(), backend)
    return as_loss(loss, metrics)


def _forward(
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,
    values: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    constants = (old_logprobs, advantages, weights, ref_logprobs, row_weight, mask, value_mask, value_row_weight)
    terms = ObjectiveTerms.unpack(*constants, denominators, cu_seqlens, numbers, kinds, num_sequences, length)
    tensors = (None if x is None else x.contiguous() for x in (logprobs, entropy, values, old_values, returns))
    slope, value_slope, sums = terms.sums(kernels(backend), *tensors)
    policy, value = terms.denominators[0], terms.denominators[1]
    entropy_slope = terms.entropy_slope() if entropy is not None else None
    return (
        terms.loss(sums, valued=values is not None),
        terms.metrics(sums),
        slope / policy,
        slope.new_zeros(0) if entropy_slope is None else entropy_slope / policy,
        value_slope if values is None else value_slope * (terms.vf_coef / value),
    )


def _fake(logprobs, entropy, values, old_values, returns, *packed):
    entropy_coef = packed[10][6]
    sizes = ((), (len(METRICS),), logprobs.shape, logprobs.shape if entropy is not None and entropy_coef else (0,))
    return tuple(logprobs.new_empty(size) for size in (*sizes, (0,) if values is None else values.shape))


class Fused(torch.autograd.Function):
    """Keeps the slopes. Not the backward of a registered op: torch takes 0.15 ms there to go through as many arguments."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, metrics, *slopes = _op(*inputs)
        ctx.save_for_backward(*slopes)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx, grad_loss, _):
        nothing = (None,) * 17
        if grad_loss is None:
            return None, None, None, *nothing
        if torch.is_grad_enabled() and checks.is_eager(grad_loss):
            refuse(ctx)  # create_graph=True: the slopes are no function here
        slopes = (
            s * grad_loss if needed and s.numel() else None
            for s, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        )
        return *slopes, *nothing


_op = define(schema_of("ppo_loss", _forward), run=_forward, fake=_fake)
