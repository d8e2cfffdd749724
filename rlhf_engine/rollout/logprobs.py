"""Log-probs and values of a rollout under a model that did not sample it. B sequences, T response width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_engine.model import ActorCritic
from rlhf_engine.rollout.rollout import Rollout


@torch.no_grad()
def rollout_logprobs(
    model: ActorCritic,
    rollout: Rollout,
    *,
    microbatch: int,
    microbatch_tokens: int | None = None,
    temperature: float = 1.0,
    values: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`(logprobs [B, T], values [B, T] or None)` of the actions, float32 and 0 outside the mask.

    `microbatch` sequences of similar length go through the trunk together, or as many as `microbatch_tokens` hold; only
    the states of actions enter the head.
    """
    logprobs = torch.zeros_like(rollout.logprobs)
    scored = torch.zeros_like(rollout.values) if values else None
    everyone = torch.arange(len(rollout), device=rollout.mask.device)
    for batch in rollout.batches(everyone, microbatch, microbatch_tokens, packed=model.packs):
        hidden = model.hidden(batch.input_ids, cu_inputs=batch.cu_inputs).flatten(0, 1)[batch.rows]
        logprobs.view(-1)[batch.source] = model.token_logprobs(hidden, batch.ids, temperature=temperature).logprobs
        if scored is not None:
            scored.view(-1)[batch.source] = model.state_values(batch, hidden)
    return logprobs, scored


@torch.no_grad()
def rollout_values(
    model: ActorCritic, rollout: Rollout, *, microbatch: int, microbatch_tokens: int | None = None
) -> Tensor:  # (B, T)
    """Values of a rollout's states by a value model of its own, float32 and 0 outside the mask."""
    values = torch.zeros_like(rollout.values)
    everyone = torch.arange(len(rollout), device=rollout.mask.device)
    for batch in rollout.batches(everyone, microbatch, microbatch_tokens, packed=model.packs):
        values.view(-1)[batch.source] = model.state_values(batch, None)
    return values


def logprob_deviation(policy: ActorCritic, rollout: Rollout, *, sequences: int, **size: Any) -> float:
    """Largest difference of the first `sequences` sampled log-probs from those of a fresh forward pass by the same policy.

    `size` are the micro-batch and the temperature, as `rollout_logprobs` takes them.
    """
    checked = rollout.take(torch.arange(min(sequences, len(rollout)), device=rollout.mask.device))
    fresh, _ = rollout_logprobs(policy, checked, **size)
    return float((fresh - checked.logprobs).abs().max())
