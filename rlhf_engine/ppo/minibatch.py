"""The gradient of a minibatch, computed in passes over parts of it. B sequences, T response width, N actions of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.config import PPOConfig
from rlhf_engine.distributed.ranks import ONE
from rlhf_engine.memory.passes import MicrobatchSize
from rlhf_engine.model import Policy
from rlhf_engine.model.roles import Want
from rlhf_engine.ppo.experience import Experience, microbatch_size
from rlhf_engine.ppo.nonfinite import all_finite
from rlhf_kernels import explained_variance, masked_whiten


def minibatch_backward(
    policy: Policy,
    experience: Experience,
    sequences: Tensor,
    config: PPOConfig,
    temperature: float,
    *,
    size: MicrobatchSize | None = None,
    **changing: float,
) -> dict[str, Tensor]:
    """Add the gradient of the loss over `sequences` to the parameters, in micro-batches; return the loss's metrics.

    The denominators are those of the minibatch, so the gradient does not depend on the micro-batches. `size` is their size,
    by default the config's; with several ranks, each adds the gradient of its sequences, and the metrics are those of all.
    `changing` are loss options that replace those of the config.
    """
    size = microbatch_size(config) if size is None else size
    rollout, totals = experience.rollout, MetricSum()
    kept, scaled = rollout.mask if experience.kept is None else experience.kept, experience.advantages
    num_tokens, num_kept = int(rollout.mask[sequences].sum()), int(kept[sequences].sum())
    positive = None if experience.positive is None else rollout.mask & experience.positive[:, None]
    num_positive = None if positive is None else int(positive[sequences].sum())
    if config.whiten_advantages and config.whiten_scope == "minibatch":
        scaled = torch.zeros_like(scaled)
        scaled[sequences] = masked_whiten(experience.advantages[sequences], rollout.mask[sequences])
    for batch in rollout.batches(sequences, **size, packed=policy.packs):
        assert batch.ids is not None and batch.source is not None

        def actions(x: Tensor, source: Tensor = batch.source) -> Tensor:  # (B, T) -> (N,)
            return x.reshape(-1)[source]

        loss = loss_options(config) | {
            "old_logprobs": actions(experience.old_logprobs),
            "advantages": actions(scaled),
            "mask": actions(kept) & batch.counts,
            "value_mask": None
            if experience.kept is None
            else torch.full_like(batch.ids, batch.counts, dtype=torch.bool),
            "old_values": actions(experience.old_values),
            "returns": actions(experience.returns),
            "weights": None if experience.weights is None else actions(experience.weights),
            "nll_mask": None if positive is None else actions(positive) & batch.counts,
            "nll_coef": config.positive_nll_coef,
            "num_tokens": num_kept,
            "num_value_tokens": num_tokens,
            "num_nll_tokens": num_positive,
            "num_sequences": len(sequences),
            "cu_seqlens": batch.cu_seqlens,
        }
        wants: tuple[Want, ...] = ("loss",) if policy.balance is None else ("loss", "balance")
        outputs = policy(batch, wants, temperature=temperature, loss=loss | changing)
        assert outputs.loss is not None
        total, metrics = outputs.loss.loss, outputs.loss.metrics
        if outputs.balance is not None:
            balance = outputs.balance * (batch.counts * len(batch.ids) / num_tokens)  # a mean over the micro-batches
            total, metrics = total + balance, metrics | {"router_aux_loss": balance.detach()}
        total.backward()
        totals.add(metrics)
    return size.get("ranks", ONE).sum_metrics(totals.total())


def is_finite(metrics: Mapping[str, Tensor], norm: Tensor) -> bool:
    """Return whether the losses and the gradient norm of a minibatch are finite."""
    return all_finite(norm, *(value for name, value in metrics.items() if name.endswith("_loss")))


def keep_value_gradients(policy: Policy) -> None:
    """Drop all gradients but those of the value function. The optimizer skips parameters without a gradient."""
    assert policy.value is not None
    values = {id(parameter) for parameter in policy.value.parameters()}
    for parameter in policy.parameters():
        if id(parameter) not in values:
            parameter.grad = None


def loss_options(config: PPOConfig) -> dict[str, Any]:
    """Return the arguments of `linear_ppo_loss` that the config sets."""
    names = (
        "objective cliprange cliprange_high dual_clip log_ratio_clamp old_kl_coef tau_pos tau_neg divergence "
        "divergence_high ratio_limit log_ratio_coef ratio_level cliprange_value vf_coef entropy_coef aggregation"
    )
    options = {name: getattr(config, name) for name in names.split()}
    # With TRPO the optimizer trains only the values, so only the value loss of this objective matters.
    return options | {"objective": "ratio"} if config.objective == "trpo" else options


class MetricSum:
    """Sum of dictionaries of device scalars without a host sync; keys that end in `_max` keep the maximum."""

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
        """Return the sums on the device. Metrics of micro-batches with the minibatch's denominators sum to the minibatch's."""
        return self.sums

    def mean(self) -> dict[str, float]:
        """Return the means (maxima for `_max`) as floats, and the explained variance computed from its sums."""
        log = {name: float(value) / (1 if name.endswith("_max") else self.count) for name, value in self.sums.items()}
        if "num_value_tokens" in self.sums:
            log["explained_variance"] = float(explained_variance(self.sums))
        parts = ("returns_sum", "returns_sq_sum", "residual_sum", "residual_sq_sum", "num_value_tokens")
        return {name: value for name, value in log.items() if name not in parts}
