"""The PPO objective on log-probs that exist already."""

from torch import Tensor

from .. import reference
from ..backend import resolve
from ..types import PPOLoss
from . import checks
from .ppo_arguments import PPOArguments


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
    assert resolve(backend, logprobs) == "reference"
    return reference.ppo_loss(logprobs, old_logprobs, advantages, mask, **args.options())
