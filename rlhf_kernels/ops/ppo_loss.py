# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Function.apply`.
"""The PPO objective from log-probs."""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .._options import PPOArguments, PPOOptions
from ..backend import define_record, flatten, kernels, names_of, refuse, resolve
from ..launch_args import METRICS, PPOLoss
from . import checks, objective
from .objective import ObjectiveTerms, as_loss


def ppo_loss(
    logprobs: Tensor,  # (B, T) or (N,), differentiable
    old_logprobs: Tensor,  # (B, T) or (N,)
    advantages: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    backend: str = "auto",
    **options: Unpack[PPOOptions],
) -> PPOLoss:
    """Return `L = agg(policy) - entropy_coef agg(H) + kl_coef agg(KL(policy || reference)) + vf_coef agg(value)`.

    With `r = exp(logprobs - old_logprobs)` (`ratio_level="sequence"`: the log-ratio is first averaged over the sequence's
    actions; `log_ratio_clamp` bounds it on both sides, with no gradient outside) the policy term is `weights` times

        clip:            -min(r A, clip(r, 1 - cliprange, 1 + cliprange_high) A); with `dual_clip` c at most -c A where A < 0
        kl_penalty:      -(r A - old_kl_coef KL(old || new)),  KL by k3: r - 1 - log r
        ratio:           -r A                                  (the surrogate of TRPO)
        policy_gradient: -A log π                              (REINFORCE, actor-critic)

    the value term `1/2 max((v - R)², (clip(v, old_values ± cliprange_value) - R)²)` (unclipped where either is None), and
    the KL term `kl_penalty(logprobs, ref_logprobs, estimator=kl_estimator)`. `kl_weighting="ratio"` multiplies it by r, as the
    policy term has it and with r's gradient: then it estimates the KL of the current policy from the old policy's samples.

    `aggregation` reduces each term over its own mask (value: `value_mask`, default `mask`): token_mean divides the sum by
    `num_tokens` (value: `num_value_tokens`), seq_mean_token_sum by `num_sequences`, seq_mean_token_mean by `num_sequences`
    after each token was divided by its sequence's count, token_sum by nothing. A denominator that is None is counted in this
    call; with the global ones, micro-batches add up to the full batch. A mask without a True gives a loss of 0, not NaN.

    Defaults: objective "clip", cliprange 0.2, cliprange_high that of cliprange, cliprange_value 0.2, vf_coef 0.1, kl_estimator
    "k3", kl_weighting "none", aggregation "token_mean"; the other coefficients 0, the other options None. An option that the
    objective does not read is refused. `logprobs`, `values` and `entropy` are differentiable, all other tensors are constants.
    Metrics: see `METRICS`.

    Source: Schulman et al. 2017 (PPO) eq. 6, 7, 8, 9; Ye et al. 2020 (dual clip) eq. 5; Yu et al. 2025 (DAPO, clip-higher)
    eq. 10; Zheng et al. 2025 (GSPO, sequence ratios) eq. 7; Schulman et al. 2015 (TRPO) eq. 14; Williams 1992 (REINFORCE);
    DeepSeek-AI 2025 (DeepSeek-V3.2), section 3.1 "Unbiased KL Estimate" (ratio-weighted KL).

    Raises:
        ValueError: a shape, dtype, device, range, choice or combination that does not fit, with the argument's name.
        TypeError: an unknown option, with the nearest known one.
    """
    args = objective.parse("ppo_loss", options)
    checks.floating("logprobs", logprobs, dims=(1, 2), what="[B, T] or [N]")
    objective.check(args, logprobs, old_logprobs, advantages, mask, name="logprobs")
    chosen = resolve("ppo_loss", backend, logprobs)
    if chosen == "reference":
        from .. import reference

        return reference.ppo_loss(logprobs, old_logprobs, advantages, mask, **objective.as_options(args))
    return fused_ppo_loss(logprobs, args.entropy, args, old_logprobs, advantages, mask, chosen)


class Inputs(NamedTuple):
    """The arguments of the registered op."""

    logprobs: Tensor  # (N,)
    entropy: Tensor | None
    values: Tensor | None
    old_values: Tensor | None
    returns: Tensor | None
    terms: ObjectiveTerms
    backend: str


NAMES = names_of(Inputs)


def fused_ppo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    args: PPOArguments,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    backend: str,
) -> PPOLoss:
    """Compute the loss by compiled kernels, for arguments that were checked."""
    logprobs = logprobs.float().reshape(-1)
    entropy, values = (None if x is None else x.float().reshape(-1) for x in (entropy, args.values))
    terms = ObjectiveTerms.of(args, old_logprobs, advantages, mask)
    targets = checks.flat(args.old_values), checks.flat(args.returns)
    loss, metrics = Fused.apply(*flatten(Inputs(logprobs, entropy, values, *targets, terms, backend)))
    return as_loss(loss, metrics)


def _forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    terms, d = x.terms, x.terms.denominators
    tokens = (None if y is None else y.contiguous() for y in (x.entropy, x.values, x.old_values, x.returns))
    slope, value_slope, sums = terms.sums(kernels(x.backend), x.logprobs.contiguous(), *tokens)
    entropy_slope = terms.entropy_slope() if x.entropy is not None else None
    return (
        terms.loss(sums, valued=x.values is not None),
        terms.metrics(sums),
        slope / d.policy,
        slope.new_zeros(0) if entropy_slope is None else entropy_slope / d.policy,
        value_slope if x.values is None else value_slope * (terms.vf_coef / d.value),
    )


def _fake(x: Inputs) -> tuple[Tensor, ...]:
    n = x.logprobs.shape
    with_entropy = x.entropy is not None and x.terms.scalars.entropy_coef
    sizes = ((), (len(METRICS),), n, n if with_entropy else (0,), (0,) if x.values is None else x.values.shape)
    return tuple(x.logprobs.new_empty(size) for size in sizes)


class Fused(torch.autograd.Function):
    """Keeps the slopes. Not the backward of a registered op: torch spends 0.15 ms there on as many arguments."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        loss, metrics, *slopes = _op(*inputs)
        ctx.save_for_backward(*slopes)
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
            refuse(ctx)  # create_graph=True: the slopes are constants
        needed = dict(zip(NAMES, ctx.needs_input_grad, strict=True))
        for name, slope in zip(("logprobs", "entropy", "values"), ctx.saved_tensors, strict=True):
            if needed[name] and slope.numel():
                gradients[name] = slope * grad_loss
        return tuple(gradients.values())


_op = define_record("ppo_loss", Inputs, _forward, _fake)
