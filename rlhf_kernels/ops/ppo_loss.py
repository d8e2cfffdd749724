# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Function.apply`.
"""The PPO objective from log-probs."""

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .._options import PPOArguments, PPOOptions
from ..backend import define_record, kernels, refuse, resolve
from ..launch_args import PPOLoss, flatten, names_of
from . import checks, direct_ppo_loss, objective
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
    """Return the PPO loss and its metrics from log-probs.

        L = agg(policy) - entropy_coef agg(H) + kl_coef agg(KL(policy || reference)) + vf_coef agg(value)

    The policy term is `weights` times one of

        clip:            -min(r A, clip(r, 1 - cliprange, 1 + cliprange_high) A)
        kl_penalty:      -(r A - old_kl_coef KL(old || new)),  KL(old || new) = r - 1 - log r  (k3)
        ratio:           -r A                                  (the surrogate of TRPO)
        policy_gradient: -A log π                              (REINFORCE, actor-critic)
        cispo:           -sg(clip(r, 1 - cliprange, 1 + cliprange_high)) A log π
        sapo:            -4/τ sigmoid(τ (r - 1)) A,  τ = tau_pos if A > 0 else tau_neg
        ipo:             -m r A + log_ratio_coef (log r)²,  m = [abs(π - π_old) <= divergence]
        dppo_tv:         the same, m = [π - π_old <= divergence_high] if A > 0 else [π_old - π <= divergence]
        dppo_kl:         the same, m = [π moved against A, or KL <= divergence_high if A > 0 else divergence]
        gspo_token:      clip with r = sg(s) π / sg(π), where s is the sequence's ratio
        gmpo:            -R A,  log R = mean over the sequence of (min(log r, cliprange_high) if A > 0
                                                                   else max(log r, -cliprange))
        a function:      f(logprobs, old_logprobs, advantages, **objective_inputs), flat tensors (N,)

    where A are `advantages`, `r = π / π_old = exp(logprobs - old_logprobs)`, sg is a constant, and KL is
    `π_old log(π_old / π) + (1 - π_old) log((1 - π_old) / (1 - π))`. With `ratio_level="sequence"` the log-ratio of a
    token is the mean over the actions of its sequence. `log_ratio_clamp` limits the log-ratio to ± this number; the
    gradient through r is 0 outside. With `dual_clip` c, the clip term is at most -c A where A < 0. `ratio_limit`
    replaces a larger r in the dppo term and in its gradient.

    The value term is `1/2 max((v - R)², (clip(v, old_values ± cliprange_value) - R)²)`, where v are `values` and R
    `returns`. It is `1/2 (v - R)²` if `old_values` or `cliprange_value` is None.

    The KL term is `kl_penalty(logprobs, ref_logprobs, estimator=kl_estimator)`. `kl_weighting="ratio"` multiplies it by
    the policy term's r, through which gradients flow. It then estimates the KL divergence of the current policy from
    samples of the old policy.

    H is `entropy`. `aggregation` (agg) reduces each term over `mask`, or the value term over `value_mask` (default:
    `mask`):

        token_mean:           sum over tokens / num_tokens (value term: num_value_tokens)
        seq_mean_token_sum:   sum over tokens / num_sequences
        seq_mean_token_mean:  sum over sequences of the mean over a sequence's tokens / num_sequences
        token_sum:            sum over tokens

    A denominator that is None is counted from the mask of this call. With the denominators of the full batch, the
    losses and gradients of micro-batches add up to those of the full batch. If no entry of the mask is True, the loss
    is 0, not NaN.

    `term` has a code of `Term` for each token, so that one batch can hold tokens with different losses:

        L = agg(objective, entropy and KL of Term.RL) + agg(-log π of Term.CROSS_ENTROPY) + agg(KL of Term.KL)
            + vf_coef agg(value)

    Each agg has the mask, and so the denominator, of its tokens, as in three separate calls: `num_tokens`,
    `num_cross_entropy_tokens` and `num_kl_tokens`. The KL of `Term.KL` has no coefficient but `term_weights`, which
    multiply all of a token's loss except its value loss. A token's other tensors may be anything if its term does not
    read them. Metrics of the objective count the tokens of `Term.RL`, and so does the default of `value_mask`.

    `nll_mask` selects the tokens of positive examples, and adds `nll_coef agg(-log π)` over them, with the denominator
    `num_nll_tokens` (VAPO). Unlike `term` it replaces no loss: a token can have the objective as well. It needs no True
    `mask`, so tokens that an importance mask rejects can be learned from. `term_weights` multiply it.

    A function returns the loss of each token, which depends on its first argument; docs/reference/objectives.md has its
    conditions and an example.

    Defaults: objective "clip", cliprange 0.2, cliprange_high equal to cliprange, cliprange_value 0.2, vf_coef 0.1, tau_pos
    1, tau_neg 1.05, divergence 0.1 for ipo, 0.2 for dppo_tv and 0.05 for dppo_kl, log_ratio_coef 0.001 for ipo,
    kl_estimator "k3", kl_weighting "none", aggregation "token_mean", ratio_level "token". The other coefficients are 0,
    the other options None. An option that the objective does not read raises ValueError. `logprobs`, `values` and
    `entropy` are differentiable; all other tensors are constants. `METRICS` describes the metrics.

    Source: Schulman et al. 2017 (PPO) eq. 6, 7, 8, 9; Ye et al. 2020 (dual clip) eq. 5; Yu et al. 2025 (DAPO,
    clip-higher) eq. 10; Zheng et al. 2025 (GSPO, sequence ratios) eq. 7; Schulman et al. 2015 (TRPO) eq. 14; Williams
    1992 (REINFORCE); DeepSeek-AI 2025 (DeepSeek-V3.2), section 3.1 "Unbiased KL Estimate" (ratio-weighted KL);
    Yue et al. 2025 (VAPO), section 4.3, "Positive Example LM Loss";
    MiniMax-M1 2025 (CISPO) eq. 4, 5; Gao et al. 2025 (SAPO), section 3; prime-rl (IPO); Qi et al. 2026 (DPPO) eq. 13, 14;
    Zheng et al. 2025 (GSPO-token), section 4.3; Zhao et al. 2025 (GMPO), section 3.

    Raises:
        ValueError: a shape, dtype, device, range, choice or combination that does not fit, with the argument's name; a
            result of a function that is a scalar, has the wrong shape, does not depend on its log-probs, or (on CPU) is
            not finite, with the function's name.
        TypeError: an unknown option; the message names the nearest option.
    """
    args = objective.parse("ppo_loss", options)
    checks.floating("logprobs", logprobs, dims=(1, 2), what="[B, T] or [N]")
    objective.check(args, logprobs, old_logprobs, advantages, mask, name="logprobs")
    chosen = resolve("ppo_loss", backend, logprobs)
    if chosen == "reference":
        from .. import reference

        return reference.ppo_loss(logprobs, old_logprobs, advantages, mask, **objective.as_options(args, mask))
    if chosen == "cpu" and direct_ppo_loss.serves(args, logprobs):
        return direct_ppo_loss.direct_ppo_loss(logprobs, args, old_logprobs, advantages, mask)
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
    """Return the loss, computed by compiled kernels from checked arguments."""
    logprobs = logprobs.float().reshape(-1)
    entropy, values = (None if x is None else x.float().reshape(-1) for x in (entropy, args.values))
    terms = ObjectiveTerms.of(args, old_logprobs, advantages, mask, logprobs)
    targets = checks.flat(args.old_values), checks.flat(args.returns)
    loss, metrics = Fused.apply(*flatten(Inputs(logprobs, entropy, values, *targets, terms, backend)))
    return as_loss(loss, metrics, terms)


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
    sizes = ((), (x.terms.num_metrics,), n, n if with_entropy else (0,), (0,) if x.values is None else x.values.shape)
    return tuple(x.logprobs.new_empty(size) for size in sizes)


class Fused(torch.autograd.Function):
    """Autograd function that computes the gradients in forward and scales them by the upstream gradient in backward.

    It is not the backward of a registered op, because torch spends 0.15 ms per call on one with this many arguments.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and the metrics; save the gradients."""
        loss, metrics, *slopes = _op(*inputs)
        ctx.save_for_backward(*slopes)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one gradient per output
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the saved gradients times the upstream gradient."""
        gradients: dict[str, Tensor | None] = dict.fromkeys(NAMES)
        if grad_loss is None:
            return tuple(gradients.values())
        if torch.is_grad_enabled() and checks.is_eager(grad_loss):
            refuse(ctx)  # create_graph=True: the saved gradients are constants
        needed = dict(zip(NAMES, ctx.needs_input_grad, strict=True))
        for name, slope in zip(("logprobs", "entropy", "values"), ctx.saved_tensors, strict=True):
            if needed[name] and slope.numel():
                gradients[name] = slope * grad_loss
        return tuple(gradients.values())


_op = define_record("ppo_loss", Inputs, _forward, _fake)
