"""The gradient of the PPO objective over a minibatch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine.config import PPOConfig
from rlhf_engine.metrics import MetricSum
from rlhf_engine.model import ActorCritic
from rlhf_engine.ppo.experience import Experience
from rlhf_engine.rollout import recompute
from rlhf_kernels import masked_whiten


def minibatch_backward(
    policy: ActorCritic,
    experience: Experience,
    sequences: Tensor,
    config: PPOConfig,
    temperature: float,
    **changing: float,
) -> dict[str, Tensor]:
    """Add the gradient of the loss over `sequences` to the parameters, in micro-batches; returns its metrics.

    The denominators are the minibatch's, so the gradient does not depend on how it is cut. `changing` are coefficients that
    are not the config's any more.
    """
    rollout, totals = experience.rollout, MetricSum()
    num_tokens, scaled = int(rollout.response_lengths[sequences].sum()), experience.advantages
    if config.whiten_advantages and config.whiten_scope == "minibatch":
        scaled = torch.zeros_like(scaled)
        scaled[sequences] = masked_whiten(experience.advantages[sequences], rollout.mask[sequences])
    for batch in rollout.batches(sequences, **microbatch_size(config), packed=policy.packs):

        def actions(x: Tensor, source: Tensor = batch.source) -> Tensor:  # (B, T) -> (N,)
            return x.reshape(-1)[source]

        loss = loss_options(config) | {
            "old_logprobs": actions(experience.old_logprobs),
            "advantages": actions(scaled),
            "mask": torch.ones_like(batch.ids, dtype=torch.bool),
            "old_values": actions(experience.old_values),
            "returns": actions(experience.returns),
            "weights": None if experience.weights is None else actions(experience.weights),
            "num_tokens": num_tokens,
            "num_value_tokens": num_tokens,
            "num_sequences": len(sequences),
            "cu_seqlens": batch.cu_seqlens,
        }
        result = policy(batch, ("loss",), temperature=temperature, loss=loss | changing).loss
        result.loss.backward()
        totals.add(result.metrics)
    return totals.total()


def microbatch_size(config: PPOConfig) -> dict[str, int | None]:
    """How much goes through a trunk at a time, as arguments of what cuts a rollout."""
    return {"microbatch": config.microbatch, "microbatch_tokens": config.microbatch_tokens}


def old_policy_kl(policy: ActorCritic, experience: Experience, config: PPOConfig, temperature: float) -> float:
    """Mean over tokens of KL(old || policy now), by k3 with r = new / old: `r - 1 - log r`."""
    rollout = experience.rollout
    logprobs = recompute(policy, rollout, ("logprobs",), temperature=temperature, **microbatch_size(config))["logprobs"]
    log_ratio = logprobs - experience.old_logprobs  # 0 outside the mask
    return float((torch.expm1(log_ratio) - log_ratio).sum() / rollout.mask.sum())


def keep_value_gradients(policy: ActorCritic) -> None:
    """Drop every gradient but the value function's: the optimiser leaves a parameter without one as it is."""
    values = {id(parameter) for parameter in policy.value.parameters()}
    for parameter in policy.parameters():
        if id(parameter) not in values:
            parameter.grad = None


def loss_options(config: PPOConfig) -> dict[str, object]:
    """The arguments of `linear_ppo_loss` that a config decides."""
    names = (
        "objective cliprange cliprange_high dual_clip log_ratio_clamp old_kl_coef ratio_level cliprange_value vf_coef "
        "entropy_coef aggregation"
    )
    options = {name: getattr(config, name) for name in names.split()}
    # TRPO's surrogate; its gradient is not the optimiser's to follow.
    return options | {"objective": "ratio"} if config.objective == "trpo" else options
