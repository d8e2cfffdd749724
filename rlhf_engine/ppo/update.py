"""Update rules, which train the policy on an experience: minibatch steps on a surrogate, or one step within a trust region.

B sequences, T response width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_engine.config import PPOConfig
from rlhf_engine.data.streams import shuffled
from rlhf_engine.memory import AnyArena
from rlhf_engine.memory.passes import MicrobatchSize
from rlhf_engine.model import ActorCritic
from rlhf_engine.notices import notice
from rlhf_engine.optim.adamw import Optimizer, Schedule, gradient_norm, optimizer_step, wrong_norm
from rlhf_engine.optim.ema import WeightAverage
from rlhf_engine.ppo.experience import Experience, Step
from rlhf_engine.ppo.minibatch import MetricSum, is_finite, keep_value_gradients, minibatch_backward
from rlhf_engine.ppo.nonfinite import (
    LOWER_RATE,
    NonFinite,
    bad_sequences,
    first_nonfinite,
    numbers_of,
    take_experience,
    tensors_of,
)
from rlhf_engine.ppo.ptx import PretrainStream, ptx_backward
from rlhf_engine.ppo.trpo import TrustRegionProblem, check_attention, trpo_step

logger = logging.getLogger(__name__)

LEFT_OUT = ("skipped_steps", "left_out_sequences")
"""Metrics of what `ppo.on_nonfinite` and `ppo.ratio_guard` leave out."""
_NEW_RUN = "begin a new run with a lower ppo.optim.lr"


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
        self.left_out: dict[str, float] = {}
        """Counts of the current update: optimizer steps and sequences that were left out."""
        self.left_out_by: set[str] = set()
        """Settings that left optimizer steps of the current update out."""

    def __call__(self, experience: Experience, step: Step) -> dict[str, float]:
        """Run all optimizer steps of one update; return the means of their metrics."""
        config, sums, device, rate = self.config, MetricSum(), self.policy.device, 0.0
        self.left_out, self.left_out_by = dict.fromkeys(LEFT_OUT, 0), set()
        per_epoch = config.rollout_batch // config.minibatch
        for epoch in range(config.ppo_epochs):
            # The learning-rate schedule also counts the steps that `stop_kl` skips, so that it ends with the run.
            first = (step.number * config.ppo_epochs + epoch) * per_epoch
            order = self.order(len(experience.rollout), step.number, epoch)
            metrics: dict[str, Tensor] = {}
            for number, sequences in enumerate(order.to(device).split(config.minibatch), first):
                found = self._optimize(experience, sequences, number, step)
                if found is not None:
                    metrics, rate = found
                    sums.add(metrics)
            if config.stop_kl is not None and metrics and float(metrics["kl_k3"]) > config.stop_kl:
                break
        if not sums.count:
            raise FloatingPointError(self._nothing_left(step))
        skipping = config.on_nonfinite != "stop" or config.ratio_guard is not None
        return sums.mean() | {"lr": rate, "epochs": epoch + 1} | (self.left_out if skipping else {})

    def _nothing_left(self, step: Step) -> str:
        """Return the message for an update without an optimizer step: the settings that left its steps out, and what to do."""
        config, by, advice = self.config, [], []
        if "ratio_guard" in self.left_out_by:
            by.append(f"ppo.ratio_guard {config.ratio_guard:g}")
            advice.append("resume with a higher ppo.ratio_guard")
        if "on_nonfinite" in self.left_out_by:
            by.append(f"ppo.on_nonfinite {config.on_nonfinite}")
            if config.on_nonfinite == "skip":
                advice.append("resume with ppo.on_nonfinite halve, which leaves out only the samples that are named")
            advice.append(_NEW_RUN)
        return (
            f"training diverged: every optimizer step of update {step.number + 1} was left out ({' and '.join(by)}); "
            f"{', or '.join(advice)}"
        )

    def order(self, sequences: int, update: int, epoch: int) -> Tensor:  # (sequences,)
        """Return the order of a rollout's sequences in an epoch."""
        return shuffled(sequences, self.seed, "minibatches", update * self.config.ppo_epochs + epoch)

    def state(self) -> dict[str, Any]:
        """Return the numbers that a resumed run needs."""
        position = {} if self.pretrain is None else {"ptx_position": self.pretrain.position}
        plans = {"planned_steps": list(self.schedule.planned)}
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
    ) -> tuple[dict[str, Tensor], float] | None:
        """Run optimizer step `number` of the run on a minibatch; return its metrics and its rate, or None if it is left out."""
        self.optimizer.prefetch()
        extra = None
        if self.pretrain is not None and not self._only_values(step):
            # The last minibatch may be short if `nonfinite_scores` skipped responses.
            extra = self.pretrain.take(max(1, round(self.config.ptx_ratio * len(sequences))))
        found = self._finite_gradient(experience, sequences, number, step, extra)
        if found is None or not self._within_guard(found[0], number):
            self._drop_gradient()
            self.left_out["skipped_steps"] += 1
            self.left_out_by.add("on_nonfinite" if found is None else "ratio_guard")
            return None
        metrics, norm = found
        norm, rate = optimizer_step(self.optimizer, self.config.optim, number, self.schedule, norm)
        self.optimizer_steps += 1
        if self.average is not None:
            self.average.update()
        return metrics | {"grad_norm": norm}, rate

    def _only_values(self, step: Step) -> bool:
        return self.values_only or step.number < self.config.value_warmup

    def _gradient(
        self,
        experience: Experience,
        sequences: Tensor,
        step: Step,
        extra: Tensor | None = None,
        config: PPOConfig | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the gradient over some sequences and over the pretraining sequences; return metrics and norm."""
        config = config or self.config

        def run(size: MicrobatchSize) -> dict[str, Tensor]:
            with self.arena.transients():
                changing = {"old_kl_coef": step.old_kl_coef}
                metrics = minibatch_backward(
                    self.policy, experience, sequences, config, self.temperature, size=size, **changing
                )
                if self._only_values(step):
                    keep_value_gradients(self.policy)
                elif extra is not None:
                    metrics |= ptx_backward(self.policy, extra, coef=config.ptx_coef, **size)
            return metrics

        metrics = step.passes.fitting(run, undo=self._drop_gradient)
        step.passes.ranks.sum_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        return metrics, gradient_norm(self.optimizer)

    def _drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _finite_gradient(
        self, experience: Experience, sequences: Tensor, number: int, step: Step, extra: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor] | None:
        """Compute the gradient of a minibatch as `on_nonfinite` asks for; return metrics and norm, or None if it is left out.

        Raises:
            FloatingPointError: the loss or the gradient is not finite, and `on_nonfinite` is "stop".
        """
        metrics, norm = self._gradient(experience, sequences, step, extra)
        if is_finite(metrics, norm):
            return metrics, norm

        self._drop_gradient()
        pretraining = extra is not None and is_finite(*self._gradient(experience, sequences, step))
        # Whitening over a minibatch spreads a NaN to all of its sequences.
        alone = replace(self.config, whiten_scope="batch")

        def finite(members: Tensor) -> bool:
            self._drop_gradient()
            return is_finite(*self._gradient(experience, members, step, config=alone))

        bad = [] if pretraining else bad_sequences(finite, sequences)
        self._drop_gradient()
        cause = self._cause(experience, sequences, bad, wrong_norm(norm, number), step, extra)
        if pretraining:
            cause.pretraining, cause.advice = True, f"{LOWER_RATE} or ppo.ptx_coef"
        step.report(cause)
        if self.config.on_nonfinite == "stop":
            raise FloatingPointError(str(cause))
        rest = sequences[[row not in bad for row in sequences.tolist()]]
        if self.config.on_nonfinite == "halve" and bad and len(rest):
            metrics, norm = self._gradient(experience, rest, step, extra)
            if is_finite(metrics, norm):
                notice(f"{cause}; the optimizer step is made without it (ppo.on_nonfinite)")
                self.left_out["left_out_sequences"] += len(bad)
                return metrics, norm
        notice(f"{cause}; the optimizer step is left out (ppo.on_nonfinite)")
        return None

    def _cause(
        self,
        experience: Experience,
        sequences: Tensor,
        bad: list[int],
        what: str,
        step: Step,
        extra: Tensor | None,
    ) -> NonFinite:
        """Return what is not finite in the gradient of a minibatch, and where."""
        first = take_experience(experience, sequences.new_tensor(bad[:1]) if bad else sequences)
        changing = {"old_kl_coef": step.old_kl_coef}

        def run() -> None:
            everyone = torch.arange(len(first.rollout), device=sequences.device)
            self._gradient(first, everyone, step, None if bad else extra)

        op = "a pass that several ranks share"  # they would find different operations, and run different passes
        if step.passes.ranks.size == 1:
            op = first_nonfinite(self.policy, tensors_of(first), run)
        numbers, data = numbers_of(experience.rollout, bad), take_experience(experience, sequences)
        return NonFinite(what, numbers, op, step.number + 1, data, changing)

    def _within_guard(self, metrics: dict[str, Tensor], number: int) -> bool:
        """Return whether the mean ratio of a minibatch is at most `ratio_guard`.

        Raises:
            FloatingPointError: it is larger, and `on_ratio` is "stop".
        """
        guard = self.config.ratio_guard
        if guard is None or (ratio := float(metrics["ratio_mean"])) <= guard:
            return True
        what = f"the mean ratio of optimizer step {number + 1} is {ratio:.4g}, above ppo.ratio_guard {guard:g}"
        if self.config.on_ratio == "stop":
            raise FloatingPointError(f"training diverged: {what}; try a lower learning rate")
        notice(f"{what}; the optimizer step is left out (ppo.on_ratio)")
        return False


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
            microbatch=step.passes.size["microbatch"],
            microbatch_tokens=step.passes.size["microbatch_tokens"],
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
