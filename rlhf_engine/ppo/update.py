"""How an update learns from its experience: minibatch steps on a surrogate, or one step within a trust region.

B sequences, T response width.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from rlhf_engine.config import PPOConfig
from rlhf_engine.data.streams import shuffled
from rlhf_engine.memory import AnyArena
from rlhf_engine.model import ActorCritic
from rlhf_engine.optim.adamw import Optimizer, optimizer_step
from rlhf_engine.optim.ema import WeightAverage
from rlhf_engine.ppo.experience import Experience, Step, microbatch_size
from rlhf_engine.ppo.loss import MetricSum, keep_value_gradients, minibatch_backward
from rlhf_engine.ppo.ptx import PretrainStream, ptx_backward
from rlhf_engine.ppo.trpo import TrustRegionProblem, trpo_step


class UpdateRule(Protocol):
    """Changes the weights by what an update learned."""

    optimizer: Optimizer
    average: WeightAverage | None
    """Moving average of the weights, updated after every step."""

    def __call__(self, experience: Experience, step: Step) -> dict[str, float]:
        """Learn from the experience of one update; return what to log."""

    def state(self) -> dict[str, int]:
        """Return the numbers that a resumed run needs."""

    def load_state(self, state: dict[str, int]) -> None:
        """Set what `state` returned."""


class SurrogateSteps:
    """`ppo_epochs` passes over the rollout in shuffled minibatches, one optimizer step each; fewer after `stop_kl`.

    Source: Schulman et al. 2017, Algorithm 1. In a value warm-up, and with `values_only`, the steps train the values only.
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
                f"pretrain: got {got} with ptx_coef {config.ptx_coef}, expected one if ptx_coef is above 0"
            )
        self.policy, self.optimizer, self.config, self.arena = policy, optimizer, config, arena
        self.temperature, self.seed, self.pretrain, self.values_only = temperature, seed, pretrain, values_only
        self.average = None if config.ema_decay is None else WeightAverage(policy, config.ema_decay)
        self.optimizer_steps = 0

    def __call__(self, experience: Experience, step: Step) -> dict[str, float]:
        """Make all optimizer steps of one update; return the means of their metrics."""
        config, sums, device = self.config, MetricSum(), self.policy.device
        per_epoch = config.rollout_batch // config.minibatch
        for epoch in range(config.ppo_epochs):
            # The schedule counts the steps that `stop_kl` skips as well, so that it ends with the run.
            first = (step.number * config.ppo_epochs + epoch) * per_epoch
            order = self.order(len(experience.rollout), step.number, epoch)
            for number, sequences in enumerate(order.to(device).split(config.minibatch), first):
                metrics, rate = self._optimize(experience, sequences, number, step)
                sums.add(metrics)
            if config.stop_kl is not None and float(metrics["kl_k3"]) > config.stop_kl:
                break
        return sums.mean() | {"lr": rate, "epochs": epoch + 1}

    def order(self, sequences: int, update: int, epoch: int) -> Tensor:  # (sequences,)
        """Return the order in which an epoch takes the sequences of a rollout."""
        return shuffled(sequences, self.seed, "minibatches", update * self.config.ppo_epochs + epoch)

    def state(self) -> dict[str, int]:
        """Return the numbers that a resumed run needs."""
        position = {} if self.pretrain is None else {"ptx_position": self.pretrain.position}
        return {"optimizer_steps": self.optimizer_steps} | position

    def load_state(self, state: dict[str, int]) -> None:
        """Set what `state` returned."""
        self.optimizer_steps = state["optimizer_steps"]
        if self.pretrain is not None:
            self.pretrain.position = state["ptx_position"]

    def _optimize(
        self, experience: Experience, sequences: Tensor, number: int, step: Step
    ) -> tuple[dict[str, Tensor], float]:
        """Make optimizer step `number` of the run, on a minibatch; return its metrics and its learning rate."""
        config = self.config
        self.optimizer.prefetch()
        with self.arena.transients():
            changing = {"old_kl_coef": step.old_kl_coef}
            metrics = minibatch_backward(self.policy, experience, sequences, config, self.temperature, **changing)
            if self.values_only or step.number < config.value_warmup:
                keep_value_gradients(self.policy)
            elif self.pretrain is not None:
                # The last minibatch may be short where `nonfinite_scores` skips.
                batch = self.pretrain.take(max(1, round(config.ptx_ratio * len(sequences))))
                metrics |= ptx_backward(self.policy, batch, coef=config.ptx_coef, **microbatch_size(config))
        total_steps = config.updates * config.ppo_epochs * (config.rollout_batch // config.minibatch)
        norm, rate = optimizer_step(self.optimizer, config.optim, number, total_steps)
        self.optimizer_steps += 1
        if self.average is not None:
            self.average.update()
        return metrics | {"grad_norm": norm}, rate


class TrustRegionStep:
    """Optimizer steps for the value function, then one constrained step of the policy (Schulman et al. 2015, TRPO)."""

    def __init__(self, values: SurrogateSteps) -> None:
        self.values = values
        self.optimizer, self.average = values.optimizer, values.average

    def __call__(self, experience: Experience, step: Step) -> dict[str, float]:
        """Train the values, then move the policy unless the run is in its value warm-up."""
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

    def state(self) -> dict[str, int]:
        """Return the numbers that a resumed run needs."""
        return self.values.state()

    def load_state(self, state: dict[str, int]) -> None:
        """Set what `state` returned."""
        self.values.load_state(state)
