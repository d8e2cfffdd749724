"""Proximal policy optimisation of a language model: Algorithm 1 of Schulman et al. 2017 with InstructGPT's reward.

One update is `collect -> score -> advantages -> update`. The environment is a bandit: a prompt comes, the policy answers, the
score lands on the last action, and every action pays `kl_coef` times its KL to the reference.
Shapes: B sequences, T response width, N actions of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor

from rlhf_engine.config import MemoryConfig, PPOConfig
from rlhf_engine.data.streams import shuffled
from rlhf_engine.memory import AnyArena, PeakMeter, PoolArena, gradients_in, open_arena
from rlhf_engine.metrics import MetricSum, peak_rss_mb
from rlhf_engine.model import ActorCritic, Reference
from rlhf_engine.optim.adamw import build_optimizer, optimizer_step
from rlhf_engine.optim.ema import WeightAverage
from rlhf_engine.optim.offload import StagedAdamW
from rlhf_engine.ppo.experience import Experience, Scored, advantages
from rlhf_engine.ppo.kl_control import adapted_kl_coef, adapted_old_kl_coef
from rlhf_engine.ppo.loss import keep_value_gradients, microbatch_size, minibatch_backward, old_policy_kl
from rlhf_engine.ppo.ptx import PretrainStream, ptx_backward
from rlhf_engine.ppo.room import head_bytes, phase_bytes
from rlhf_engine.ppo.trpo import TrustRegionProblem, trpo_step
from rlhf_engine.rewards.scaling import RewardFunction, ScoreScale, score_answers
from rlhf_engine.rollout import Generator, Rollout, logprob_deviation, recompute, reference_logprobs


def collect(generator: Generator, prompts: Sequence[Tensor], sequence: Tensor, arena: AnyArena) -> Rollout:
    """Sample one response to each prompt; `sequence` [B] numbers them in the run. Keys and values lie in the arena."""
    return generator.generate(prompts, sequence, allocate=arena.memory)


def score(
    rollout: Rollout,
    policy: ActorCritic,
    reference: Reference,
    reward_fn: RewardFunction,
    config: PPOConfig,
    temperature: float,
    scale: ScoreScale | None = None,
    first: int = 0,
    transients: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Scored:
    """Score every response (see `score_answers`) and get the log-probs of the old policy and of the reference.

    `transients` is where forward passes of the models find memory.
    """
    scale = scale or ScoreScale(config.score_scale)
    rollout, scores, raw_scores = score_answers(rollout, reward_fn, config, scale, first)
    size = microbatch_size(config)
    with transients():
        ref_logprobs = reference_logprobs(reference, rollout, temperature=temperature, **size)
        old_logprobs, old_values = rollout.logprobs, rollout.values
        if config.old_logprobs == "rescored":
            again = recompute(policy, rollout, ("logprobs", "values"), temperature=temperature, **size)
            old_logprobs, old_values = again["logprobs"], again["values"]
        elif not policy.value.shares_trunk:
            old_values = recompute(policy, rollout, ("values",), **size)["values"]
        if config.baseline == "none":
            old_values = torch.zeros_like(old_values)
    # What survives the phase is copied out of it.
    made = (old_logprobs.clone(), old_values.clone(), ref_logprobs.clone())
    return Scored(rollout, scores, raw_scores, *made)


_NUMBERS = ("updates_done", "optimizer_steps", "kl_coef", "old_kl_coef")


class PPOTrainer:
    """Holds what changes from update to update: the weights, the optimiser and a few numbers.

    All randomness is a function of `seed` and the counters, so a resumed run draws the same numbers. `prompts(first, count)`
    gives the prompts number `first` to `first + count` of an endless stream.
    """

    def __init__(
        self,
        policy: ActorCritic,
        reference: Reference,
        generator: Generator,
        prompts: Callable[[int, int], Sequence[Tensor]],
        reward_fn: RewardFunction,
        config: PPOConfig,
        *,
        seed: int,
        pretrain: PretrainStream | None = None,
        memory: MemoryConfig | None = None,
    ) -> None:
        if (pretrain is None) != (config.ptx_coef == 0.0):
            got = "none" if pretrain is None else "one"
            raise ValueError(f"pretrain: got {got} with ptx_coef {config.ptx_coef}, expected one where it is above 0")
        if config.microbatch_tokens is not None:
            policy.check_packing()
        self.policy, self.reference, self.generator = policy, reference, generator
        self.prompts, self.reward_fn, self.config, self.seed = prompts, reward_fn, config, seed
        self.pretrain = pretrain
        self.optimizer = build_optimizer(policy, config.optim, (memory or MemoryConfig()).optimizer_state)
        self.trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.arena = open_arena(policy.device, phase_bytes(policy, generator, self.optimizer), head_bytes(policy))
        if isinstance(self.optimizer, StagedAdamW):
            self.optimizer.take = self.arena.take
        self.meter = PeakMeter(policy.device)
        self.scale = ScoreScale(config.score_scale)
        self.average = None if config.ema_decay is None else WeightAverage(policy, config.ema_decay)
        self.kl_coef, self.old_kl_coef = config.kl_coef, config.old_kl_coef
        self.updates_done = 0
        self.optimizer_steps = 0
        self.whole = True
        """Whether the state is that of `updates_done` updates; False within an update once it has changed a weight."""
        self.optimizer.register_step_pre_hook(self._changes)

    def state(self) -> dict[str, int | float]:
        """The numbers that a resumed run needs."""
        numbers = {name: getattr(self, name) for name in _NUMBERS} | self.scale.state()
        return numbers if self.pretrain is None else numbers | {"ptx_position": self.pretrain.position}

    def load_state(self, state: dict[str, int | float]) -> None:
        """Go on from what `state` gave."""
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self.scale.load_state(state)
        if self.pretrain is not None:
            self.pretrain.position = state["ptx_position"]

    def train(self, on_update: Callable[[int, dict[str, float]], object] | None = None) -> None:
        """Run until `config.updates` are done; `on_update(number, metrics)` follows each."""
        while self.updates_done < self.config.updates:
            log = self.step()
            if on_update is not None:
                on_update(self.updates_done, log)

    def step(self) -> dict[str, float]:
        """One iteration of Algorithm 1. Whatever breaks it before a weight changes leaves the state as it was."""
        before, done = self.state(), self.updates_done
        self.arena.reset()
        try:
            log = self._update_policy()
        finally:
            if self.whole and self.updates_done == done:
                self.load_state(before)
                self.optimizer.zero_grad(set_to_none=True)
        return log

    def _changes(self, *_: object) -> None:
        self.whole = False

    def _update_policy(self) -> dict[str, float]:
        config, temperature = self.config, self.generator.config.temperature
        clock = [time.perf_counter()]
        first = self.updates_done * config.rollout_batch
        sequence = torch.arange(first, first + config.rollout_batch)
        with self._phase("generate"):
            rollout = collect(self.generator, self.prompts(first, config.rollout_batch), sequence, self.arena)
        clock.append(time.perf_counter())
        with self._phase("score"):
            models = (self.policy, self.reference, self.reward_fn)
            scored = score(rollout, *models, config, temperature, self.scale, first, self.arena.transients)
            deviation = self._deviation(scored)
        experience, log = advantages(scored, config, self.kl_coef, self.policy.backend)
        clock.append(time.perf_counter())
        if config.nonfinite_scores == "skip":
            log["scores_skipped"] = len(rollout) - len(scored.rollout)
        with self._phase("train"), gradients_in(self.arena, self.trained):
            log |= deviation | {"kl_coef": self.kl_coef} | self.update(experience, temperature)
        log |= self._adapt(experience, log, temperature)
        clock.append(time.perf_counter())
        self.updates_done += 1
        self.whole = True
        seconds = dict(zip(("collect", "score", "update"), (b - a for a, b in pairwise(clock)), strict=True))
        log |= {f"seconds_{phase}": spent for phase, spent in seconds.items()}
        log["tokens_per_second"] = int(rollout.mask.sum()) / (clock[-1] - clock[0])
        log["sampled_tokens_per_second"] = int(rollout.mask.sum()) / seconds["collect"]
        if self.generator.paged is not None:
            log["restarted_sequences"] = self.generator.paged.restarted
        if isinstance(self.arena, PoolArena):
            log["pool_held_mb"] = self.arena.held_bytes / 1e6
        return log | self.meter.log() | {"peak_rss_mb": peak_rss_mb()}

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        with self.arena.phase(name), self.meter.phase(name):  # measured once the phase before has given its bytes back
            yield

    def _deviation(self, scored: Scored) -> dict[str, float]:
        """How far the sampled log-probs are from those of a fresh forward pass; the policy is still the one that sampled."""
        config, rollout, count = self.config, scored.rollout, self.generator.config.check_sequences
        if config.old_logprobs == "rescored":
            return {"logprob_deviation": float((scored.old_logprobs - rollout.logprobs).abs().max())}
        if count == 0:
            return {}
        size = microbatch_size(config) | {"temperature": self.generator.config.temperature}
        with self.arena.transients():
            return {"logprob_deviation": logprob_deviation(self.policy, rollout, sequences=count, **size)}

    def update(self, experience: Experience, temperature: float) -> dict[str, float]:
        """`ppo_epochs` passes over the batch in shuffled minibatches, one optimiser step each; fewer after `stop_kl`."""
        config, sums, device = self.config, MetricSum(), self.policy.device
        per_epoch = config.rollout_batch // config.minibatch
        for epoch in range(config.ppo_epochs):
            # The schedule counts the steps that `stop_kl` left out as well, so that it ends where the run does.
            order = self._shuffled(epoch, len(experience.rollout))
            place = (self.updates_done * config.ppo_epochs + epoch) * per_epoch
            for number, sequences in enumerate(order.to(device).split(config.minibatch), place):
                metrics, rate = self._optimise(experience, sequences, temperature, number)
                sums.add(metrics)
            if config.stop_kl is not None and float(metrics["kl_k3"]) > config.stop_kl:
                break
        log = sums.mean() | {"lr": rate, "epochs": epoch + 1}
        if config.objective == "trpo" and not self._warming_up:
            log |= self._constrained_step(experience, temperature)
        return log

    def _constrained_step(self, experience: Experience, temperature: float) -> dict[str, float]:
        problem = TrustRegionProblem(
            self.policy,
            experience.rollout,
            experience.old_logprobs,
            experience.advantages,
            temperature,
            **microbatch_size(self.config),
        )
        self._changes()
        with self.arena.transients():
            found = trpo_step(problem, self.config.trpo)
        if self.average is not None:
            self.average.update()
        return found

    def _optimise(
        self, experience: Experience, sequences: Tensor, temperature: float, number: int
    ) -> tuple[dict[str, Tensor], float]:
        """Optimiser step `number` of the run, on a minibatch; its metrics and its learning rate."""
        config = self.config
        changing = {"old_kl_coef": self.old_kl_coef}
        if isinstance(self.optimizer, StagedAdamW):
            self.optimizer.prefetch()
        with self.arena.transients():
            metrics = minibatch_backward(self.policy, experience, sequences, config, temperature, **changing)
            if self._warming_up or config.objective == "trpo":
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

    def _adapt(self, experience: Experience, log: dict[str, float], temperature: float) -> dict[str, float]:
        """Move the KL coefficients to where this update's KLs want them; returns what was measured for it."""
        config, found = self.config, {}
        if self._warming_up:
            return found
        if config.kl_control == "adaptive":
            kl = log["kl"] if config.kl_unit == "sequence" else log["kl_per_token"]
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                kl,
                target=config.kl_target,
                horizon=config.kl_horizon,
                sequences=len(experience.rollout),
            )
        if config.old_kl_target is not None:
            with self._phase("score"), self.arena.transients():
                old_kl = old_policy_kl(self.policy, experience, config, temperature)
            found = {"old_kl": old_kl, "old_kl_coef": self.old_kl_coef}
            self.old_kl_coef = adapted_old_kl_coef(self.old_kl_coef, old_kl, target=config.old_kl_target)
        return found

    @property
    def _warming_up(self) -> bool:
        return self.updates_done < self.config.value_warmup

    def _shuffled(self, epoch: int, sequences: int) -> Tensor:
        return shuffled(sequences, self.seed, "minibatches", self.updates_done * self.config.ppo_epochs + epoch)
