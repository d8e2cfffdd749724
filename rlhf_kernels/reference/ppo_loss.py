"""The definitions of `ppo_loss`, `logits_ppo_loss` and `linear_ppo_loss` in eager PyTorch."""

from collections.abc import Callable, Mapping
from typing import Unpack

import torch
from torch import Tensor

from .._options import OF_SEQUENCES, ObjectiveFunction, PPOOptions, Term
from ..launch_args import METRICS, PPOLoss
from .kl_penalty import kl_penalty
from .segments import segment_ids
from .surrogate import Surrogate, SurrogateOptions, sequence_parts, surrogate
from .token_logprobs import linear_logits, token_logprobs


def ppo_loss(
    logprobs: Tensor,  # (B, T) or (N,)
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    term: Tensor | None = None,
    term_weights: Tensor | None = None,
    nll_mask: Tensor | None = None,
    nll_coef: float = 0.0,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_mask: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ratio_level: str = "token",
    cliprange_value: float | None = 0.2,
    vf_coef: float = 0.1,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_weighting: str = "none",
    objective_inputs: Mapping[str, Tensor] | None = None,
    aggregation: str = "token_mean",
    num_tokens: float | Tensor | None = None,
    num_value_tokens: float | Tensor | None = None,
    num_cross_entropy_tokens: float | Tensor | None = None,
    num_kl_tokens: float | Tensor | None = None,
    num_nll_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    **surrogate_options: Unpack[SurrogateOptions],
) -> PPOLoss:
    """Return `L = policy - entropy_coef H + kl_coef KL(policy || reference) + vf_coef value + nll_coef NLL + other terms`.

    All terms have the same aggregation. Tokens with a `term` other than `Term.RL` are in the other terms only.
    """
    wide = torch.promote_types(logprobs.dtype, torch.float32)
    seq, b = segment_ids(mask.view(logprobs.shape), cu_seqlens)
    counted = mask.flatten()
    mask = counted if term is None else counted & (term.flatten() == Term.RL)
    value_mask = mask if value_mask is None else value_mask.flatten()

    def rows(x: Tensor, where: Tensor = mask) -> Tensor:  # (N,), float32 or wider, 0 where `where` is False
        return torch.where(where, x.flatten().to(wide), 0)

    def weights_of(on: Tensor, total: float | Tensor | None) -> Tensor:
        w = _token_weights(on, seq, b, aggregation, total, num_sequences, wide)
        return w if term_weights is None else w * rows(term_weights.detach(), on)

    weight = weights_of(mask, num_tokens)
    old, new, a = rows(old_logprobs.detach()), rows(logprobs), rows(advantages.detach())
    w = weight if weights is None else weight * rows(weights.detach())
    inputs = {k: torch.where(mask, x.detach().flatten(), 0) for k, x in (objective_inputs or {}).items()}
    s, apart = _policy_term(new, old, a, mask, seq, b, ratio_level, inputs, surrogate_options)
    total = policy_loss = (torch.where(mask, s.loss, 0) * w).sum()
    ratio_slope, own_slope = s.slope * w, s.own * w
    if callable(objective := surrogate_options.get("objective")):
        own_slope = _derivative(objective, new, old, a, inputs, w)

    def mean(x: Tensor) -> Tensor:  # metrics are means over tokens for any aggregation
        return torch.where(mask, x.detach().to(wide), 0).sum() / _count(mask.sum(), num_tokens)

    metrics = dict.fromkeys(METRICS, new.new_zeros(()))
    if entropy is not None:
        h = rows(entropy)
        total, metrics["entropy"] = total - entropy_coef * (h * weight).sum(), mean(h)
        own_slope = own_slope + abs(entropy_coef) * weight
    if ref_logprobs is not None:
        ref = rows(ref_logprobs.detach())
        kl = kl_penalty(new, ref, estimator=kl_estimator)
        metrics["ref_kl"] = mean(kl)
        kl_slope = _kl_slope(new - ref, kl_estimator)
        if kl_weighting == "ratio":
            ratio_slope = ratio_slope + kl_coef * (kl * s.live).detach() * weight
            kl, kl_slope = kl * s.ratio, kl_slope * s.ratio.detach()
        total = total + kl_coef * (kl * weight).sum()
        own_slope = own_slope + kl_coef * kl_slope * weight
    if term is not None:
        counts = num_cross_entropy_tokens, num_kl_tokens
        parts = _other_terms(logprobs, ref_logprobs, term.flatten(), counted, kl_estimator, rows, weights_of, counts)
        total, metrics = total + parts["cross_entropy_loss"] + parts["kl_loss"], metrics | parts
    if nll_mask is not None:
        parts = _positive_nll(logprobs, nll_mask.flatten(), num_nll_tokens, rows, weights_of)
        total, metrics = total + nll_coef * parts["nll_loss"], metrics | parts
    if values is not None and returns is not None:
        value_weight = _token_weights(value_mask, seq, b, aggregation, num_value_tokens, num_sequences, wide)
        v, r = rows(values, value_mask), rows(returns.detach(), value_mask)
        old_v = None if old_values is None or cliprange_value is None else rows(old_values.detach(), value_mask)
        loss, clipped = _value_loss(v, old_v, r, cliprange_value)
        value_loss = (loss * value_weight).sum()
        total = total + vf_coef * value_loss
        metrics |= _value_metrics(value_loss, clipped, v, r, value_mask, _count(value_mask.sum(), num_value_tokens))
    if ratio_level == "sequence" or objective == "gmpo":
        ratio_slope = torch.where(apart, 0, _sequence_mean(torch.where(mask, ratio_slope, 0), mask, seq, b))
    metrics |= _policy_metrics(s, apart, new, old, mask, mean, ratio_slope + own_slope) | {"policy_loss": policy_loss}
    return PPOLoss(total, {k: v.detach().float() for k, v in metrics.items()})


def _policy_term(
    new: Tensor,
    old: Tensor,
    a: Tensor,
    mask: Tensor,
    seq: Tensor,
    b: int,
    ratio_level: str,
    inputs: dict[str, Tensor],
    options: SurrogateOptions,
) -> tuple[Surrogate, Tensor]:
    """Return the policy term of each token, and which tokens contribute a constant to their sequence's ratio."""
    objective = options.get("objective", "clip")
    log_ratio = per_token = new - old
    parts, apart = sequence_parts(per_token, a, **options)
    if ratio_level == "sequence" or objective in OF_SEQUENCES:
        log_ratio = _sequence_mean(parts, mask, seq, b)
    if objective == "gspo_token":  # the value is the sequence's, the gradient the token's
        log_ratio = log_ratio.detach() + (per_token - per_token.detach())
    if callable(objective):
        s = surrogate(log_ratio, new, old, a, objective="ratio")
        zero = torch.zeros_like(a)
        return s._replace(loss=objective(new, old, a, **inputs), slope=zero, own=zero), apart
    return surrogate(log_ratio, new, old, a, **options), apart


def _policy_metrics(
    s: Surrogate,
    apart: Tensor,
    new: Tensor,
    old: Tensor,
    mask: Tensor,
    mean: Callable[[Tensor], Tensor],
    slope: Tensor,
) -> dict[str, Tensor]:
    """Return the metrics of the policy term other than its value."""
    return {
        "clipfrac": mean(s.clipped | apart),
        "dual_clipfrac": mean(s.dual_clipped),
        "approx_kl": mean(old - new),
        "kl_k3": mean(torch.expm1(new - old) - (new - old)),
        "ratio_mean": mean(s.ratio),
        "active_fraction": mean(slope != 0),
        "num_tokens": mask.sum(),
        "ratio_max": torch.where(mask, s.ratio, 0).amax() if mask.numel() else new.new_zeros(()),
    }


def _other_terms(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    term: Tensor,
    counted: Tensor,
    kl_estimator: str,
    rows: Callable[[Tensor, Tensor], Tensor],
    weights_of: Callable[[Tensor, float | Tensor | None], Tensor],
    counts: tuple[float | Tensor | None, float | Tensor | None],
) -> dict[str, Tensor]:
    """Return the losses of the tokens with a cross-entropy and with a KL, and their numbers, as metrics."""
    of_ce, of_kl = counted & (term == Term.CROSS_ENTROPY), counted & (term == Term.KL)
    ref = logprobs if ref_logprobs is None else ref_logprobs
    kl = kl_penalty(rows(logprobs, of_kl), rows(ref.detach(), of_kl), estimator=kl_estimator)
    return {
        "cross_entropy_loss": -(rows(logprobs, of_ce) * weights_of(of_ce, counts[0])).sum(),
        "kl_loss": (torch.where(of_kl, kl, 0) * weights_of(of_kl, counts[1])).sum(),
        "num_cross_entropy_tokens": of_ce.sum(),
        "num_kl_tokens": of_kl.sum(),
    }


def _positive_nll(
    logprobs: Tensor,
    positive: Tensor,
    num_tokens: float | Tensor | None,
    rows: Callable[[Tensor, Tensor], Tensor],
    weights_of: Callable[[Tensor, float | Tensor | None], Tensor],
) -> dict[str, Tensor]:
    """Return the loss of the positive examples and the number of its tokens, as metrics."""
    nll = -(rows(logprobs, positive) * weights_of(positive, num_tokens)).sum()
    return {"nll_loss": nll, "num_nll_tokens": positive.sum()}


def _derivative(
    objective: ObjectiveFunction, new: Tensor, old: Tensor, a: Tensor, inputs: dict[str, Tensor], w: Tensor
) -> Tensor:
    """Return the derivative of the weighted sum of the losses that a function returns, by its log-probs."""
    with torch.enable_grad():
        leaf = new.detach().requires_grad_()
        return torch.autograd.grad(objective(leaf, old, a, **inputs).to(w.dtype), leaf, w)[0]


def _kl_slope(d: Tensor, estimator: str) -> Tensor:
    slopes = {"k1": torch.ones_like, "k2": lambda x: x, "k3": lambda x: -torch.expm1(-x), "abs": torch.sign}
    return slopes[estimator](d.detach())


def _value_loss(v: Tensor, old: Tensor | None, returns: Tensor, cliprange: float | None) -> tuple[Tensor, Tensor]:
    """Return `1/2 max((v - R)^2, (clip(v, old ± ε) - R)^2)`, and where the clipped error is larger."""
    plain = (v - returns).square()
    if old is None:
        return 0.5 * plain, torch.zeros_like(v)
    assert cliprange is not None
    clip = (v.clamp(old - cliprange, old + cliprange) - returns).square()
    return 0.5 * torch.where(clip > plain, clip, plain), clip > plain


def _value_metrics(
    loss: Tensor, clipped: Tensor, v: Tensor, r: Tensor, mask: Tensor, count: Tensor
) -> dict[str, Tensor]:
    error = r - v
    return {
        "value_loss": loss,
        "value_clipfrac": (clipped & mask if clipped.dtype == torch.bool else clipped).sum() / count,
        "num_value_tokens": mask.sum(),
        "returns_sum": r.sum(),
        "returns_sq_sum": r.square().sum(),
        "residual_sum": error.sum(),
        "residual_sq_sum": error.square().sum(),
    }


def _count(here: Tensor, given: float | Tensor | None) -> Tensor:
    """Return the denominator `given` by the caller, or the count `here` of this batch, and 1 instead of 0.

    The loss of an empty batch is therefore 0.
    """
    x = torch.as_tensor(here if given is None else given, device=here.device)
    return torch.where(x > 0, x, 1)


def _token_weights(
    mask: Tensor,
    seq: Tensor,
    b: int,
    aggregation: str,
    num_tokens: float | Tensor | None,
    num_sequences: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weight of each token's term in the sum; 0 where the mask is False."""
    on = mask.to(dtype)
    if aggregation == "token_sum":
        return on
    if aggregation == "token_mean":
        return on / _count(mask.sum(), num_tokens)
    lengths = on.new_zeros(b).index_add(0, seq, on)
    weight = on / _count((lengths > 0).sum(), num_sequences)
    return weight if aggregation == "seq_mean_token_sum" else weight / lengths.clamp(min=1)[seq]


def _sequence_mean(x: Tensor, mask: Tensor, seq: Tensor, b: int) -> Tensor:
    """Return for each token the mean of `x` over the actions of its sequence."""
    lengths = x.new_zeros(b).index_add(0, seq, mask.to(x.dtype)).clamp(min=1)
    return (x.new_zeros(b).index_add(0, seq, x) / lengths)[seq]


def logits_ppo_loss(
    logits: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    **options: Unpack[PPOOptions],
) -> PPOLoss:
    """Return `ppo_loss` of the log-probs and the entropies that the logits give."""
    transform = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    taken = token_logprobs(logits, ids, **transform, mask=seen_tokens(mask, options), entropy=True)
    options["entropy"] = taken.entropy
    return ppo_loss(taken.logprobs, old_logprobs, advantages, mask, **options)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    value_weight: Tensor | None = None,
    value_bias: Tensor | None = None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    **options: Unpack[PPOOptions],
) -> PPOLoss:
    """Return `logits_ppo_loss` of `linear_logits(...)`, with values from the same hidden states."""
    if value_weight is not None:
        options["values"] = head_values(hidden, value_weight, value_bias, mask, options)
    logits = linear_logits(hidden, weight, bias, low_rank, seen_tokens(mask, options))
    transform = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    return logits_ppo_loss(logits, ids, old_logprobs, advantages, mask, **transform, **options)


def seen_tokens(mask: Tensor, options: PPOOptions) -> Tensor:
    """Return the tokens whose log-probs the loss reads."""
    nll_mask = options.get("nll_mask")
    return mask if nll_mask is None else mask | nll_mask


def head_values(
    hidden: Tensor, value_weight: Tensor, value_bias: Tensor | None, mask: Tensor, options: PPOOptions
) -> Tensor:
    """Return `hidden @ value_weight + value_bias` for the tokens of the value loss, in float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    given, term = options.get("value_mask"), options.get("term")
    value_mask = given if given is not None else mask if term is None else mask & (term == Term.RL)
    seen = torch.where(value_mask[..., None], hidden, 0)  # masked rows may be NaN
    return seen.to(wide) @ value_weight.to(wide) + (0 if value_bias is None else value_bias.to(wide))
