"""Log-probs and values of a rollout's actions, computed again by a forward pass. B sequences, T response width, N actions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.roles import Policy, Reference, Want
from rlhf_engine.rollout.rollout import Rollout


@torch.no_grad()
def recompute(
    policy: Policy, rollout: Rollout, want: Collection[Want], *, temperature: float = 1.0, **size: Any
) -> dict[str, Tensor]:  # name -> (B, T)
    """Return what `want` names ("logprobs", "entropy", "values") for every action, float32 and 0 outside the mask.

    `size` is the micro-batch, `microbatch` and `microbatch_tokens` as `Rollout.batches` takes them. Only the states of actions
    enter the output layer.
    """

    def of_batch(batch: TokenBatch) -> dict[str, Tensor]:
        outputs = policy(batch, want, temperature=temperature)
        return {name: getattr(outputs, name) for name in want}

    return _of_actions(rollout, of_batch, want, packed=policy.packs, **size)


@torch.no_grad()
def reference_logprobs(
    reference: Reference, rollout: Rollout, *, temperature: float = 1.0, **size: Any
) -> Tensor:  # (B, T)
    """Return the reference's log-prob of every action, float32 and 0 outside the mask; `size` as in `recompute`."""

    def of_batch(batch: TokenBatch) -> dict[str, Tensor]:
        return {"logprobs": reference.logprobs(batch, temperature=temperature)}

    return _of_actions(rollout, of_batch, ("logprobs",), packed=reference.packs, **size)["logprobs"]


def logprob_deviation(policy: Policy, rollout: Rollout, *, sequences: int, **settings: Any) -> float:
    """Return the largest difference between sampled log-probs and those of a fresh forward pass by the same policy.

    The first `sequences` of the rollout are compared; `settings` are those of `recompute`.
    """
    checked = rollout.take(torch.arange(min(sequences, len(rollout)), device=rollout.mask.device))
    fresh = recompute(policy, checked, ("logprobs",), **settings)["logprobs"]
    return float((fresh - checked.logprobs).abs().max())


def _of_actions(
    rollout: Rollout,
    of_batch: Callable[[TokenBatch], dict[str, Tensor]],  # name -> (N,)
    names: Collection[str],
    *,
    packed: bool,
    microbatch: int,
    microbatch_tokens: int | None = None,
) -> dict[str, Tensor]:  # name -> (B, T)
    found = {name: torch.zeros_like(rollout.logprobs) for name in names}
    everyone = torch.arange(len(rollout), device=rollout.mask.device)
    for batch in rollout.batches(everyone, microbatch, microbatch_tokens, packed=packed):
        for name, values in of_batch(batch).items():
            found[name].view(-1)[batch.source] = values
    return found
