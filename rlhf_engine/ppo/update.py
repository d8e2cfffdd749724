"""Update rules, which train the policy on an experience: minibatch steps on a surrogate, or one step within a trust region.

B sequences, T response width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_engine.config import PPOConfig
from rlhf_engine.data.streams import shuffled
from rlhf_engine.memory import AnyArena
from rlhf_engine.model import ActorCritic, Policy
from rlhf_engine.model.roles import Want
from rlhf_engine.optim.adamw import Optimizer, Schedule, optimizer_step
from rlhf_engine.optim.ema import WeightAverage
from rlhf_engine.ppo.experience import Experience, Step, microbatch_size
from rlhf_engine.ppo.ptx import PretrainStream, ptx_backward
from rlhf_engine.ppo.trpo import TrustRegionProblem, check_attention, trpo_step
from rlhf_kernels import explained_variance, masked_whiten

logger = logging.getLogger(__name__)


class UpdateRule(Protocol):
    """Trains the policy on the experience of one update."""

    optimizer: Optimizer
    average: WeightAverage | None
    """Moving average of the weights, updated after every step."""

    def __call__(self, experience: Experience, step: Step) -> dict[str, float]:
        """Train on the experience of one update; return the metrics."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the numbers that a resumed run needs."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""


class SurrogateSteps:
    """`ppo_epochs` passes over the rollout in shuffled minibatches with one optimizer step each, or fewer after `stop_kl`.

    Source: Schulman et al. 2017, Algorithm 1. In the value warm-up, and with `values_only`, the steps train only the values.
    """

    def __init__(
        self,
        policy: ActorCritic,
        optimizer: Optimizer,
        config: PPOConfig,
        arena: AnyArena,
        *,
        temperature: float,
        seed: int,
        pretrain: PretrainStream | None = None,
        values_only: bool = False,
    ) -> None:
        if (pretrain is None) != (config.ptx_coef == 0.0):
            got = "no stream" if pretrain is None else "a stream"
            raise ValueError(
                f"pretrain: got {got} with ptx_coef {config.ptx_coef}; pass a stream if and only if ptx_coef is above 0"
            )
        self.policy, self.optimizer, self.config, self.arena = policy, optimizer, config, arena
        self.temperature, self.seed, self.pretrain, self.values_only = temperature, seed, pretrain, values_only
        self.average = None if config.ema_decay is None else WeightAverage(policy, config.ema_decay)
        self.steps_per_update = config.ppo_epochs * (config.rollout_batch // config.minibatch)
        self.schedule = Schedule(config.optim, config.updates * self.steps_per_update)
        self.optimizer_steps = 0

    def __call__(self, experience: Experience, step: Step) -> dict[str, float]:
        """Run all optimizer steps of one update; return the means of their metrics."""
        config, sums, device = self.config, MetricSum(), self.policy.device
        per_epoch = config.rollout_batch // config.minibatch
        for epoch in range(config.ppo_epochs):
            # The learning-rate schedule also counts the steps that `stop_kl` skips, so that it ends with the run.
            first = (step.number * config.ppo_epochs + epoch) * per_epoch
            order = self.order(len(experience.rollout), step.number, epoch)
            for number, sequences in enumerate(order.to(device).split(config.minibatch), first):
                metrics, rate = self._optimize(experience, sequences, number, step)
                sums.add(metrics)
            if config.stop_kl is not None and float(metrics["kl_k3"]) > config.stop_kl:
                break
        return sums.mean() | {"lr": rate, "epochs": epoch + 1}

    def order(self, sequences: int, update: int, epoch: int) -> Tensor:  # (sequences,)
        """Return the order of a rollout's sequences in an epoch."""
        return shuffled(sequences, self.seed, "minibatches", update * self.config.ppo_epochs + epoch)

    def state(self) -> dict[str, Any]:
        """Return the numbers that a resumed run needs."""
        position = {} if self.pretrain is None else {"ptx_position": self.pretrain.position}
        plans = {"planned_steps": [list(plan) for plan in self.schedule.planned]}
        return {"optimizer_steps": self.optimizer_steps} | position | plans

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.optimizer_steps = state["optimizer_steps"]
        if "planned_steps" in state:  # checkpoints of earlier versions have none
            self.schedule.planned = [(first, total) for first, total in state["planned_steps"]]
            self._replan(state["updates_done"])
        if self.pretrain is not None:
            self.pretrain.position = state["ptx_position"]

    def _replan(self, done: int) -> None:
        """Go on after `done` updates with the learning rate that the run was planned with, without a jump."""
        first, before = done * self.steps_per_update, self.schedule.planned[-1][1] // self.steps_per_update
        if self.schedule.replan(first, self.config.updates * self.steps_per_update):
            logger.warning(
                "ppo.updates: the run was planned for %d updates and has %d now; the learning rate of update %d stays %.3g and "
                "falls to that of the last update from there",
                *(before, self.config.updates, done + 1, self.schedule.rate(first)),
            )

    def _optimize(
        self, experience: Experience, sequences: Tensor, number: int, step: Step
    ) -> tuple[dict[str, Tensor], float]:
        """Run optimizer step `number` of the run on a minibatch; return its metrics and its learning rate."""
        config = self.config
        self.optimizer.prefetch()
        with self.arena.transients():
            changing = {"old_kl_coef": step.old_kl_coef}
            metrics = minibatch_backward(self.policy, experience, sequences, config, self.temperature, **changing)
            if self.values_only or step.number < config.value_warmup:
                keep_value_gradients(self.policy)
            elif self.pretrain is not None:
                # The last minibatch may be short if `nonfinite_scores` skipped responses.
                batch = self.pretrain.take(max(1, round(config.ptx_ratio * len(sequences))))
                metrics |= ptx_backward(self.policy, batch, coef=config.ptx_coef, **microbatch_size(config))
        norm, rate = optimizer_step(self.optimizer, config.optim, number, self.schedule)
        self.optimizer_steps += 1
        if self.average is not None:
            self.average.update()
        return metrics | {"grad_norm": norm}, rate


class TrustRegionStep:
    """Optimizer steps of the value function, then one constrained step of the policy (Schulman et al. 2015, TRPO)."""

    def __init__(self, values: SurrogateSteps) -> None:
        check_attention(values.policy.trunk.config._attn_implementation)
        self.values = values
        self.optimizer, self.average = values.optimizer, values.average

    def __call__(self, experience: Experience, step: Step) -> dict[str, float]:
        """Train the values, then the policy unless the run is in its value warm-up."""
        rule, log = self.values, self.values(experience, step)
        if step.number < rule.config.value_warmup:
            return log
        problem = TrustRegionProblem(
            rule.policy,
            experience.rollout,
            experience.old_logprobs,
            experience.advantages,
            rule.temperature,
            **microbatch_size(rule.config),
        )
        step.on_change()
        with rule.arena.transients():
            log |= trpo_step(problem, rule.config.trpo)
        if self.average is not None:
            self.average.update()
        return log

    def state(self) -> dict[str, Any]:
        """Return the numbers that a resumed run needs."""
        return self.values.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.values.load_state(state)


def minibatch_backward(
    policy: Policy,
    experience: Experience,
    sequences: Tensor,
    config: PPOConfig,
    temperature: float,
    **changing: float,
) -> dict[str, Tensor]:
    """Add the gradient of the loss over `sequences` to the parameters, in micro-batches; return the loss's metrics.

    The denominators are those of the minibatch, so the gradient does not depend on the micro-batches. `changing` are loss
    options that replace those of the config.
    """
    rollout, totals = experience.rollout, MetricSum()
    kept, scaled = rollout.mask if experience.kept is None else experience.kept, experience.advantages
    num_tokens, num_kept = int(rollout.mask[sequences].sum()), int(kept[sequences].sum())
    if config.whiten_advantages and config.whiten_scope == "minibatch":
        scaled = torch.zeros_like(scaled)
        scaled[sequences] = masked_whiten(experience.advantages[sequences], rollout.mask[sequences])
    for batch in rollout.batches(sequences, **microbatch_size(config), packed=policy.packs):
        assert batch.ids is not None and batch.source is not None

        def actions(x: Tensor, source: Tensor = batch.source) -> Tensor:  # (B, T) -> (N,)
            return x.reshape(-1)[source]

        loss = loss_options(config) | {
            "old_logprobs": actions(experience.old_logprobs),
            "advantages": actions(scaled),
            "mask": actions(kept),
            "value_mask": None if experience.kept is None else torch.ones_like(batch.ids, dtype=torch.bool),
            "old_values": actions(experience.old_values),
            "returns": actions(experience.returns),
            "weights": None if experience.weights is None else actions(experience.weights),
            "num_tokens": num_kept,
            "num_value_tokens": num_tokens,
            "num_sequences": len(sequences),
            "cu_seqlens": batch.cu_seqlens,
        }
        wants: tuple[Want, ...] = ("loss",) if policy.balance is None else ("loss", "balance")
        outputs = policy(batch, wants, temperature=temperature, loss=loss | changing)
        assert outputs.loss is not None
        total, metrics = outputs.loss.loss, outputs.loss.metrics
        if outputs.balance is not None:
            balance = outputs.balance * (len(batch.ids) / num_tokens)  # a mean over the micro-batches
            total, metrics = total + balance, metrics | {"router_aux_loss": balance.detach()}
        total.backward()
        totals.add(metrics)
    return totals.total()


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
