"""The named objectives of `ppo_loss` against the policy losses that verl registers, as `Case`s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.agreement import originals
from benchmarks.agreement.case import Batch, Case
from rlhf_kernels import ppo_loss

BY_TOKEN, BY_SEQUENCE = "token-mean", "seq-mean-token-mean"
FINITE = ("holes", "lengths", "full", "one")
"""All batches except the one with log-ratios beyond the limits of verl's exponentials."""


def verl_objective_cases() -> Iterator[Case]:
    """Yield one case per objective and set of options."""
    low_high = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3}, {"cliprange": 0.1, "cliprange_high": 0.3}
    yield _case("cispo", "cispo", *low_high, batches=(*FINITE, "extreme"), log_ratio_clamp=20.0)
    taus = {"tau_pos": 0.7, "tau_neg": 1.4}
    yield _case("sapo", "sapo", taus, taus, BY_SEQUENCE)
    yield _case("gspo", "gspo_token", *low_high, BY_SEQUENCE)
    narrow = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}, {"cliprange": 3e-4, "cliprange_high": 4e-4}
    yield _case("gspo", "gspo_token", *narrow, BY_SEQUENCE, note="range of the paper")
    # verl averages over all sequences, and counts those without a token.
    yield _case("geo_mean", "gmpo", *low_high, BY_SEQUENCE, every_sequence=True)
    for kind in ("tv", "kl"):
        for limit in (20.0, 1.1):
            theirs = {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": limit}
            ours = {"divergence": 0.01, "divergence_high": 0.02, "ratio_limit": limit}
            note = f"gradient, ratios up to {limit}"
            yield _case(f"dppo_{kind}", f"dppo_{kind}", theirs, ours, gradient_only=True, note=note)


def _case(
    name: str,
    objective: str,
    config: dict[str, float],
    options: dict[str, float],
    mode: str = BY_TOKEN,
    *,
    batches: tuple[str, ...] = FINITE,
    note: str = "",
    every_sequence: bool = False,
    gradient_only: bool = False,  # the loss of verl's DPPO has the same gradient and a different value
    **more: float,
) -> Case:
    module = originals.verl()
    function = getattr(module, f"compute_policy_loss_{name}")
    settings = object.__new__(module.ActorConfig)  # without the checks of settings that a policy loss does not read
    vars(settings).update({"clip_ratio": 0.2, "global_batch_info": {}} | config)
    aggregation = mode.replace("-", "_")

    def ours(b: Batch, logprobs: Any) -> Any:
        count = {"num_sequences": len(b.mask)} if every_sequence else {}
        given: Any = {"objective": objective, "aggregation": aggregation} | options | more | count
        return ppo_loss(logprobs, b.old_logprobs, b.advantages, b.mask.bool(), **given).loss

    def theirs(b: Batch, logprobs: Any) -> Any:
        return function(b.old_logprobs, logprobs, b.advantages, b.mask.to(logprobs.dtype), mode, settings)[0]

    def call(side: Any, b: Batch) -> Any:
        loss = side(b, b.logprobs.clamp(max=-1e-3))  # log-probs, as those of a policy
        return loss - loss.detach() if gradient_only else loss

    name = f"compute_policy_loss_{name}"
    return Case("verl", "0.9.1", name, ours, theirs, call, ("logprobs",), batches, note)
