# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Tensor.tolist`.
"""NeMo-RL's `ClippedPGLossFn`, with the same signature, names of options and metrics.

B sequences, S positions, of which the first has no log-prob; T = S - 1. r is the ratio of the policy to `prev_logprobs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._options import PPOOptions
from ..ops import checks, importance_weights, kl_penalty, ppo_loss
from .conventions import AggregationOptions, counted

TRUNCATIONS = ("tis", "icepop", "seq-mask-tis")
KL_TYPES = ("k1", "k2", "k3")
INF = math.inf


@dataclass(frozen=True)
class ClippedPGLossConfig:
    """The options of NeMo-RL's `loss_fn`, with its defaults."""

    disable_ppo_ratio: bool = False
    """Use `-A log π` instead of the ratio."""
    token_level_loss: bool = True
    """Average over the tokens of all sequences; False: over the means of the sequences."""
    sequence_level_importance_ratios: bool = False
    """One ratio and one importance weight per sequence (GSPO)."""
    ratio_clip_min: float = 0.2
    """Lower bound of the ratio is 1 minus this number."""
    ratio_clip_max: float = 0.2
    """Upper bound of the ratio is 1 plus this number."""
    ratio_clip_c: float | None = None
    """Bound of the dual clip; None: no dual clip."""
    reference_policy_kl_penalty: float = 0.01
    """Coefficient of KL(policy || reference)."""
    reference_policy_kl_type: str = "k3"
    """Estimator of the KL: k1, k2 or k3."""
    kl_input_clamp_value: float | None = 20.0
    """Log-ratios of the KL are limited to ± this number."""
    kl_output_clamp_value: float | None = 10.0
    """The weighted KL of a token is limited to ± this number."""
    use_kl_in_reward: bool = False
    """The rewards have the KL; the loss has none."""
    use_importance_sampling_correction: bool = False
    """Weight each token, or each sequence, by the ratio of `prev_logprobs` to `generation_logprobs`."""
    truncated_importance_sampling_type: str | None = None
    """`tis` limits these weights, `icepop` and `seq-mask-tis` set them to 0 outside of the bounds."""
    truncated_importance_sampling_ratio: float | None = None
    """Upper bound of the weight."""
    truncated_importance_sampling_ratio_min: float | None = None
    """Lower bound of the weight."""
    use_on_policy_kl_approximation: bool = False
    """Weight the KL by the ratio of the policy to `generation_logprobs`."""
    force_on_policy_ratio: bool = False
    """Use the policy's own log-probs as `prev_logprobs`, so that r is 1."""
    use_cispo: bool = False
    """Use the objective of CISPO."""
    positive_example_nll_weight: float = 0.0
    """Coefficient of `-log π` on sequences with a positive reward (VAPO)."""


def read_config(cfg: Any) -> ClippedPGLossConfig:
    """Return NeMo-RL's config, a mapping or an object with these fields, as ours.

    Raises:
        ValueError: a field that this adapter does not know, or options that exclude each other.
    """
    if isinstance(cfg, ClippedPGLossConfig):
        found = cfg
    else:
        given = dict(cfg) if isinstance(cfg, Mapping) or hasattr(cfg, "model_fields_set") else vars(cfg)
        known = tuple(field.name for field in fields(ClippedPGLossConfig))
        for name in given:
            checks.choice("cfg", name, known)
        found = ClippedPGLossConfig(**given)
    _check_objective(found)
    _check_truncation(found)
    return found


def _check_objective(c: ClippedPGLossConfig) -> None:
    checks.choice("cfg.reference_policy_kl_type", c.reference_policy_kl_type, KL_TYPES)
    checks.number("cfg.ratio_clip_c", c.ratio_clip_c, above=1, optional=True)
    checks.number("cfg.positive_example_nll_weight", c.positive_example_nll_weight, least=0)
    if c.sequence_level_importance_ratios and c.token_level_loss:
        raise ValueError("cfg: pass token_level_loss=False with sequence_level_importance_ratios")
    if c.disable_ppo_ratio and not c.force_on_policy_ratio and c.ratio_clip_c is not None:
        raise ValueError(
            f"cfg.ratio_clip_c: got {c.ratio_clip_c} with disable_ppo_ratio, where NeMo-RL compares a log-prob with it and "
            "this adapter does not; set it to None"
        )
    if c.use_cispo:
        others = "disable_ppo_ratio", "force_on_policy_ratio", "sequence_level_importance_ratios"
        for name in (*others, "ratio_clip_c"):
            if getattr(c, name) not in (False, None):
                raise ValueError(f"cfg: pass use_cispo or {name}, not both")
        if not c.token_level_loss:
            raise ValueError("cfg.token_level_loss: got False with use_cispo, expected True")


def _check_truncation(c: ClippedPGLossConfig) -> None:
    kind, high = c.truncated_importance_sampling_type, c.truncated_importance_sampling_ratio
    low = c.truncated_importance_sampling_ratio_min
    if kind is None:
        if high is not None:
            raise ValueError(
                f"cfg.truncated_importance_sampling_type is not set, but truncated_importance_sampling_ratio is; pass one of "
                f"{', '.join(TRUNCATIONS)}"
            )
        return
    checks.choice("cfg.truncated_importance_sampling_type", kind, TRUNCATIONS)
    if not c.use_importance_sampling_correction:
        raise ValueError(f"cfg.truncated_importance_sampling_type: {kind!r} needs use_importance_sampling_correction")
    if high is None:
        raise ValueError("cfg.truncated_importance_sampling_ratio is not set; pass the upper bound of the weights")
    checks.number("cfg.truncated_importance_sampling_ratio", high, above=0)
    if low is None and kind != "tis":
        raise ValueError(f"cfg.truncated_importance_sampling_ratio_min is not set, but {kind!r} needs it")
    checks.number("cfg.truncated_importance_sampling_ratio_min", low, least=0, most=high, optional=True)
    if kind == "seq-mask-tis" and c.sequence_level_importance_ratios:
        raise ValueError(
            "cfg: pass truncated_importance_sampling_type='seq-mask-tis' or sequence_level_importance_ratios"
        )


class Tokens(NamedTuple):
    """The tensors of a call in float32, without the first position; constants except `new` and `unfiltered`."""

    new: Tensor  # (B, T), differentiable
    unfiltered: Tensor  # (B, T), differentiable: log-probs for the KL
    prev: Tensor  # (B, T)
    generation: Tensor  # (B, T)
    reference: Tensor | None  # (B, T)
    advantages: Tensor  # (B, T)
    mask: Tensor  # (B, T), bool
    samples: Tensor  # (B,), bool
    rewards: Tensor | None  # (B,)


class ClippedPGLossMixin:
    """A mixin for NeMo-RL's loss: PPO, GRPO, REINFORCE, GSPO or CISPO with KL, importance correction and positive NLL.

    class Loss(ClippedPGLossMixin, ClippedPGLossFn): ...

    It replaces `__call__`. NeMo-RL's class keeps what its trainers read: `loss_type`, `input_type` and
    `metric_normalizations`.
    """

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False):
        super().__init__(cfg, use_fused_linear_logprobs)  # pyright: ignore[reportCallIssue]  # the class after the mixin
        self.cfg: ClippedPGLossConfig = read_config(cfg)

    def __call__(
        self,
        next_token_logprobs: Tensor,  # (B, T), differentiable
        data: Mapping[str, Tensor],  # each (B, S) or (B,)
        global_valid_seqs: Tensor | float | None,
        global_valid_toks: Tensor | float | None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and NeMo-RL's metrics as Python numbers, with one synchronization on a GPU.

        Counts that are None are those of the call.
        """
        c, x = self.cfg, self._tokens(next_token_logprobs, data)
        aggregation: AggregationOptions = {
            "aggregation": "token_mean" if c.token_level_loss else "seq_mean_token_mean",
            "num_tokens": global_valid_toks,
            "num_sequences": global_valid_seqs,
        }
        weights, outside = _importance(c, x)
        used = weights if c.use_importance_sampling_correction else None
        options: PPOOptions = {"weights": used, **_objective(c), **aggregation}
        loss, _ = ppo_loss(x.new, x.prev, x.advantages, x.mask, **options)
        zero = loss.new_zeros(())
        kl = zero if x.reference is None else _kl(c, x, x.reference, aggregation)
        nll = zero
        if c.positive_example_nll_weight > 0 and x.rewards is not None:
            correct = x.mask & (x.rewards > 0)[:, None]
            ones = torch.ones_like(x.advantages)
            nll, _ = ppo_loss(x.new, x.prev, ones, correct, objective="policy_gradient")
        loss = loss + c.reference_policy_kl_penalty * kl + c.positive_example_nll_weight * nll
        with torch.no_grad():
            counts = (
                x.mask.sum() if global_valid_toks is None else global_valid_toks,
                x.samples.sum() if global_valid_seqs is None else global_valid_seqs,
            )
            metrics = _metrics(c, x, weights, outside, *counts)
            metrics |= {"loss": loss.detach(), "kl_penalty": kl.detach(), "positive_nll_loss": nll.detach()}
            numbers = torch.stack([value.float() for value in metrics.values()]).tolist()
        return loss, dict(zip(metrics, numbers, strict=True))

    def _tokens(self, new: Tensor, data: Mapping[str, Tensor]) -> Tokens:
        c = self.cfg
        checks.floating("next_token_logprobs", new, dims=(2,), what="[B, T]")
        tokens = counted("token_mask", data["token_mask"][:, 1:], new)
        samples = counted("sample_mask", data["sample_mask"], new[:, 0])
        has_kl = c.reference_policy_kl_penalty != 0 and not c.use_kl_in_reward
        new = checks.widen(new)

        def constant(name: str) -> Tensor:
            x = data[name][:, 1:]
            checks.tensor(name, x, like=new, expected=new.shape, what="the shape of next_token_logprobs and one column")
            return checks.wide(x)

        return Tokens(
            new=new,
            unfiltered=checks.widen(data.get("curr_logprobs_unfiltered", new)),
            prev=new.detach() if c.force_on_policy_ratio else constant("prev_logprobs"),
            generation=constant("generation_logprobs"),
            reference=constant("reference_policy_logprobs") if has_kl else None,
            advantages=constant("advantages"),
            mask=tokens & samples[:, None],
            samples=samples,
            rewards=data.get("rewards"),
        )


class _Settings:
    """The attributes that NeMo-RL's class has, as the values of its enumerations."""

    input_type: str = "logprob"

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool):
        self.use_fused_linear_logprobs: bool = use_fused_linear_logprobs
        self.loss_type: str = "token_level" if read_config(cfg).token_level_loss else "sequence_level"


class ClippedPGLossFn(ClippedPGLossMixin, _Settings):
    """The loss without NeMo-RL's class, for a custom loop."""


def _objective(c: ClippedPGLossConfig) -> PPOOptions:
    """Return the options of `ppo_loss` for the policy term."""
    if c.force_on_policy_ratio:
        return {"objective": "ratio"}
    if c.disable_ppo_ratio:
        return {"objective": "policy_gradient"}
    bounds: PPOOptions = {"cliprange": c.ratio_clip_min, "cliprange_high": c.ratio_clip_max}
    if c.use_cispo:
        return {"objective": "cispo", **bounds}
    level = "sequence" if c.sequence_level_importance_ratios else "token"
    return {"objective": "clip", "dual_clip": c.ratio_clip_c, "ratio_level": level, **bounds}


def _importance(c: ClippedPGLossConfig, x: Tokens) -> tuple[Tensor, Tensor | None]:
    """Return the importance weights (B, T), and where they are outside of the bounds.

    Log-ratios are limited to ±20. NeMo-RL does not limit them, and sets an infinite weight to 0.
    """
    level = "sequence" if c.sequence_level_importance_ratios else "token"
    pair = x.prev, x.generation
    kind, high = c.truncated_importance_sampling_type, c.truncated_importance_sampling_ratio
    low = c.truncated_importance_sampling_ratio_min or 0.0
    raw = importance_weights(*pair, x.mask, level=level, high=None).weights
    if kind is None or high is None:
        return raw, None
    if kind == "tis":
        return raw.clamp(low, high), (raw < low) | (raw > high)
    level = "geometric" if kind == "seq-mask-tis" else level
    kept = importance_weights(*pair, x.mask, level=level, action="mask", low=low, high=high).mask
    return torch.where(kept, raw, 0), x.mask & ~kept


def _kl(c: ClippedPGLossConfig, x: Tokens, reference: Tensor, aggregation: AggregationOptions) -> Tensor:
    """Return the aggregated KL, whose token is weighted by the ratio to the sampling policy, with its gradient."""
    unfiltered = x.unfiltered
    sampler = x.generation if c.use_on_policy_kl_approximation else unfiltered.detach()
    inside, most = (INF if x is None else x for x in (c.kl_input_clamp_value, c.kl_output_clamp_value))

    def weighted(logprobs: Tensor, sampler: Tensor, _: Tensor, *, reference: Tensor) -> Tensor:
        far = (logprobs - reference).abs() > inside
        moving = torch.where(far, logprobs.detach(), logprobs)
        limited = torch.where(far, moving - (moving - reference).clamp(-inside, inside), reference)
        kl = kl_penalty(moving, limited.detach(), estimator=c.reference_policy_kl_type)
        return (kl * (moving - sampler).exp()).clamp(-most, most)

    inputs = {"reference": reference}
    return ppo_loss(
        unfiltered, sampler, x.advantages, x.mask, objective=weighted, objective_inputs=inputs, **aggregation
    ).loss


def _ratios(c: ClippedPGLossConfig, x: Tokens) -> tuple[Tensor, Tensor]:
    """Return the ratios of the metrics, and clipped; with `disable_ppo_ratio` both are the log-probs, as in NeMo-RL."""
    if c.force_on_policy_ratio:
        return torch.ones_like(x.new), torch.ones_like(x.new)
    if c.disable_ppo_ratio:
        return x.new, x.new
    moved = x.new - x.prev
    if c.sequence_level_importance_ratios:
        count = x.mask.sum(-1, keepdim=True).clamp(min=1)
        moved = (torch.where(x.mask, moved, 0).sum(-1, keepdim=True) / count).expand_as(moved)
    ratio = moved.exp()
    return ratio, ratio.clamp(1 - c.ratio_clip_min, 1 + c.ratio_clip_max)


def _metrics(
    c: ClippedPGLossConfig,
    x: Tokens,
    weights: Tensor,
    outside: Tensor | None,
    tokens: Tensor | float,
    sequences: Tensor | float,
) -> dict[str, Tensor]:
    """Return the metrics except those of the terms. Means are sums over this call divided by the global counts."""
    estimator, mask = c.reference_policy_kl_type, x.mask

    def mean(value: Tensor) -> Tensor:
        return torch.where(mask, value, 0).sum() / (tokens + 1e-8)

    def per_sequence(value: Tensor) -> Tensor:  # of values that are the same for all tokens of a sequence
        return torch.where(mask, value, -INF).amax(-1).clamp(min=0).sum() / (sequences + 1e-8)

    ratios, limited = _ratios(c, x)
    metrics = {"probs_ratio": mean(ratios), "probs_ratio_clamped": mean(limited)}
    for name, value in (("probs_ratio", ratios), ("probs_ratio_clamped", limited)):
        metrics[f"{name}_min"] = torch.where(mask, value, INF).amin()
        metrics[f"{name}_max"] = torch.where(mask, value, -INF).amax()
    prev, generation = x.prev, x.generation
    mixture = torch.logaddexp(prev, generation) - math.log(2)
    shares = [kl_penalty(mixture, y, estimator="k3") for y in (prev, generation)]
    metrics |= {
        "token_mult_prob_error": mean((generation - prev).abs().exp()),
        "gen_kl_error": mean(kl_penalty(generation, prev, estimator=estimator)),
        "policy_kl_error": mean(kl_penalty(prev, generation, estimator=estimator)),
        "js_divergence_error": mean(0.5 * (shares[0] + shares[1])),
        "sampling_importance_ratio": (per_sequence if c.sequence_level_importance_ratios else mean)(weights),
        "num_valid_samples": x.samples.sum(),
        "approx_entropy": -mean((x.new - generation).exp() * x.new),
    }
    if outside is not None:
        by_sequence = c.truncated_importance_sampling_type == "seq-mask-tis"
        metrics["is_oob_ratio"] = (per_sequence if by_sequence else mean)(outside.float())
    return metrics
