"""Rewards, advantages and value targets from the scores, log-probs and values of a rollout."""

import torch
from torch import Tensor

from .._options import KL_ESTIMATORS
from ..backend import define, kernels, resolve
from ..launch_args import RolloutAdvantages
from . import checks
from .gae import gae


def rollout_advantages(
    scores: Tensor,  # (B,)
    logprobs: Tensor,  # (B, T) or (N,)
    ref_logprobs: Tensor,  # (B, T) or (N,)
    values: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,  # (B,) if a tensor
    value_gamma: float | None = None,
    value_lam: float | Tensor | None = None,  # (B,) if a tensor
    score_clip: float | None = None,
    score_index: Tensor | None = None,  # (B,), int64
    bootstrap: Tensor | None = None,  # (B,)
    holes: str = "skip",
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    cu_seqlens: Tensor | None = None,  # (B + 1,), int32
    backend: str = "auto",
) -> RolloutAdvantages:
    """Return the rewards of InstructGPT, and their advantages and value targets by GAE.

        r_t = -kl_coef * KL_t + [t = t_score] * clip(score, ±score_clip)

    where KL_t is the estimate `kl_penalty(logprobs, ref_logprobs, estimator=kl_estimator)` of a token, and t_score is
    the position of the score in the sequence: the last action (the last token with a True mask), or `score_index`. The
    score is dropped if `score_index` is a masked token or if the sequence has no action.

    `whiten_rewards` divides the rewards by their standard deviation and keeps their mean. `whiten_advantages` gives the
    advantages mean 0 and variance 1. Both use the unbiased variance over all True tokens. `gamma`, `lam`, `value_gamma`,
    `value_lam`, `bootstrap` and `holes` are those of `gae`. There is no gradient.

    Source: Ouyang et al. 2022 (InstructGPT), eq. 2 and section 3.5; Ziegler et al. 2019 for whitening.

    Raises:
        ValueError: a shape, dtype, device, range or choice that does not fit, with the argument's name.
    """
    checks.floating("logprobs", logprobs, dims=(1, 2), what="[B, T] or [N]")
    b = checks.sequences(logprobs, cu_seqlens, name="logprobs")
    like: checks.Like = {"like": logprobs, "expected": logprobs.shape, "what": "the shape of logprobs"}
    checks.tensor("ref_logprobs", ref_logprobs, **like)
    checks.tensor("values", values, **like)
    checks.mask("mask", mask, **like)
    checks.tensor("scores", scores, like=logprobs, expected=(b,), what="one score per sequence")
    if score_index is not None:
        check_score_index(score_index, logprobs, b, cu_seqlens)
    checks.choice("kl_estimator", kl_estimator, KL_ESTIMATORS)
    checks.number("score_clip", score_clip, above=0, optional=True)
    checks.number("kl_coef", kl_coef)
    checks.recursion(gamma, lam, value_gamma, value_lam, bootstrap, holes, logprobs, b)
    chosen = resolve("rollout_advantages", backend, logprobs)
    if chosen == "reference":
        from .. import reference

        return reference.rollout_advantages(
            checks.wide(scores),
            checks.wide(logprobs),
            checks.wide(ref_logprobs),
            checks.wide(values),
            mask,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            gamma=gamma,
            lam=checks.wide_lam(lam),
            value_gamma=value_gamma,
            value_lam=checks.wide_lam(value_lam),
            score_clip=score_clip,
            score_index=score_index,
            bootstrap=checks.wide(bootstrap),
            holes=holes,
            whiten_rewards=whiten_rewards,
            whiten_advantages=whiten_advantages,
            cu_seqlens=cu_seqlens,
        )
    clip, estimator = float("inf") if score_clip is None else score_clip, KL_ESTIMATORS.index(kl_estimator)
    whiten = whiten_rewards, whiten_advantages
    # There is no gradient, so eager tensors do not need the dispatcher, which takes a sixth of the time of a small call.
    run = _run if checks.is_eager(logprobs) else _op
    result = RolloutAdvantages(
        *run(scores, logprobs, ref_logprobs, values, mask, kl_coef, estimator, gamma, *checks.split_lam(lam), clip, score_index,
             bootstrap, holes == "skip", *whiten, cu_seqlens, chosen)
    )  # fmt: skip
    if value_gamma is None and value_lam is None:
        return result
    value = gae(
        result.rewards,
        values,
        mask,
        gamma=gamma if value_gamma is None else value_gamma,
        lam=lam if value_lam is None else value_lam,
        bootstrap=bootstrap,
        holes=holes,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return result._replace(returns=value.returns)


def check_score_index(index: Tensor, tokens: Tensor, b: int, cu_seqlens: Tensor | None) -> None:
    """Check that each position is inside its sequence. For an empty sequence any position is accepted."""
    checks.integers("score_index", index, like=tokens, expected=(b,), what="one position per sequence")
    if checks.values_visible(index):
        lengths = torch.full_like(index, tokens.shape[-1]) if cu_seqlens is None else cu_seqlens.diff()
        outside = ((index < 0) | (index >= lengths)) & (lengths > 0)
        if bool(outside.any()):
            raise ValueError(f"score_index: got {index[outside][0].item()}, expected a position inside its sequence")


def _run(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, kl_coef: float,
    kl_estimator: int, gamma: float, lam: float, lams: Tensor | None, score_clip: float, score_index: Tensor | None,
    bootstrap: Tensor | None, skip_holes: bool, whiten_rewards: bool, whiten_advantages: bool, cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return kernels(backend).rollout_advantages(
        scores=checks.dense(scores),
        logprobs=checks.dense(logprobs),
        ref_logprobs=checks.dense(ref_logprobs),
        values=checks.dense(values),
        mask=mask.contiguous(),
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        gamma=gamma,
        lam=lam if lams is None else checks.dense(lams),
        score_clip=score_clip,
        score_index=None if score_index is None else score_index.long().contiguous(),
        bootstrap=None if bootstrap is None else checks.dense(bootstrap),
        skip_holes=skip_holes,
        whiten_rewards=whiten_rewards,
        whiten_advantages=whiten_advantages,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
    )


def _fake(scores: Tensor, logprobs: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(logprobs.new_empty(logprobs.shape, dtype=torch.float32) for _ in range(4))


_op = define(
    "rollout_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, float kl_coef,"
    " int kl_estimator, float gamma, float lam, Tensor? lams, float score_clip, Tensor? score_index,"
    " Tensor? bootstrap, bool skip_holes, bool whiten_rewards, bool whiten_advantages, Tensor? cu_seqlens, str backend)"
    " -> (Tensor advantages, Tensor returns, Tensor rewards, Tensor kl)",
    run=_run,
    fake=_fake,
)
