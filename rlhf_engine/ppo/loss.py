"""The gradient of the PPO objective over a minibatch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine.config import PPOConfig
from rlhf_engine.model import Policy
from rlhf_engine.ppo.experience import Experience, microbatch_size
from rlhf_engine.rollout import recompute
from rlhf_kernels import explained_variance, masked_whiten


def minibatch_backward(
    policy: Policy,
    experience: Experience,
    sequences: Tensor,
    config: PPOConfig,
    temperature: float,
    **changing: float,
) -> dict[str, Tensor]:
    """Add the gradient of the loss over `sequences` to the parameters, in micro-batches; return its metrics.

    The denominators are the minibatch's, so the gradient does not depend on the micro-batches. `changing` are loss options that
    replace the config's.
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


def old_policy_kl(policy: Policy, experience: Experience, config: PPOConfig, temperature: float) -> float:
    """Return the mean over tokens of KL(old || policy now), by k3 with r = new / old: `r - 1 - log r`."""
    rollout = experience.rollout
    logprobs = recompute(policy, rollout, ("logprobs",), temperature=temperature, **microbatch_size(config))["logprobs"]
    log_ratio = logprobs - experience.old_logprobs  # 0 outside the mask
    return float((torch.expm1(log_ratio) - log_ratio).sum() / rollout.mask.sum())


def keep_value_gradients(policy: Policy) -> None:
    """Drop every gradient but the value function's; the optimizer does not step a parameter without one."""
    values = {id(parameter) for parameter in policy.value.parameters()}
    for parameter in policy.parameters():
        if id(parameter) not in values:
            parameter.grad = None


def loss_options(config: PPOConfig) -> dict[str, object]:
    """Return the arguments of `linear_ppo_loss` that a config decides."""
    names = (
        "objective cliprange cliprange_high dual_clip log_ratio_clamp old_kl_coef ratio_level cliprange_value vf_coef "
        "entropy_coef aggregation"
    )
    options = {name: getattr(config, name) for name in names.split()}
    # TRPO's surrogate, of which the optimizer follows the value loss only.
    return options | {"objective": "ratio"} if config.objective == "trpo" else options


class MetricSum:
    """Sums dictionaries of device scalars without a host sync; keys that end in `_max` keep the largest."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add one dictionary; all must have the same keys."""
        self.count += 1
        for name, value in metrics.items():
            before = self.sums.get(name)
            if before is None:
                self.sums[name] = value.clone()
            else:
                self.sums[name] = torch.maximum(before, value) if name.endswith("_max") else before + value

    def total(self) -> dict[str, Tensor]:
        """The sums, on the device: micro-batches that were given global denominators add up to their minibatch."""
        return self.sums

    def mean(self) -> dict[str, float]:
        """Means over the dictionaries (largest for `_max`) as floats, explained variance from its sums."""
        log = {name: float(value) / (1 if name.endswith("_max") else self.count) for name, value in self.sums.items()}
        if "num_value_tokens" in self.sums:
            log["explained_variance"] = float(explained_variance(self.sums))
        parts = ("returns_sum", "returns_sq_sum", "residual_sum", "residual_sq_sum", "num_value_tokens")
        return {name: value for name, value in log.items() if name not in parts}
