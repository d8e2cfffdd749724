"""Proximal policy optimization of a language model: Algorithm 1 of Schulman et al. 2017 with InstructGPT's reward.

One update is `collect -> score -> advantages -> update rule -> adapt`. The environment is a bandit: the policy responds to a
prompt, the last action gets the score as its reward, and every action gets `-kl_coef` times its KL to the reference.
Shapes: B sequences, T response width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedTokenizerBase

from rlhf_engine.config import PPOConfig
from rlhf_engine.distributed.fsdp import whole
from rlhf_engine.distributed.ranks import ONE, Ranks
from rlhf_engine.files import OPTIMIZER
from rlhf_engine.memory import AnyArena, PeakMeter, gradients_in
from rlhf_engine.memory.arena import peak_rss_mb
from rlhf_engine.memory.passes import Passes
from rlhf_engine.model import ActorCritic, Reference
from rlhf_engine.model.saving import check_saved, copy_weights, save_policy
from rlhf_engine.notices import notice
from rlhf_engine.optim.state_dict import load_optimizer_tensors, optimizer_tensors
from rlhf_engine.ppo.callbacks import Ending
from rlhf_engine.ppo.divergence import Divergence
from rlhf_engine.ppo.experience import Experience, Scored, Step, advantages, microbatch_size, score
from rlhf_engine.ppo.kl_control import adapted_kl_coef, adapted_old_kl_coef, old_policy_kl
from rlhf_engine.ppo.nonfinite import LOWER_RATE, NonFinite, bad_scored, first_nonfinite, numbers_of, take_scored
from rlhf_engine.rewards.scaling import DealtReward, RewardFunction, ScoreScale
from rlhf_engine.rollout import Generator, Rollout, joined, logprob_deviation, recompute

if TYPE_CHECKING:
    from rlhf_engine.ppo.callbacks import Callback
    from rlhf_engine.ppo.update import UpdateRule

EMA = "ema"
"""Subfolder of a checkpoint with the averaged weights, a model in the format of the checkpoint itself."""

PHASE = "rlhf phase: "
"""Start of the names under which a profile of torch shows the phases of an update."""

_NUMBERS = ("updates_done", "kl_coef", "old_kl_coef")


class PPOTrainer:
    """The training loop, with the state that changes between updates. `build_trainer` creates its arguments from a config.

    All random numbers are functions of `seed` and the counters, so a resumed run draws the same numbers.
    `prompts(first, count)` returns prompts number `first` to `first + count - 1` of an endless stream. With several `ranks`,
    each of them runs this loop with the same arguments, and computes passes over the sequences that it is dealt.
    """

    stage, unit = "ppo", "update"

    def __init__(
        self,
        policy: ActorCritic,
        reference: Reference,
        generator: Generator,
        prompts: Callable[[int, int], Sequence[Tensor]],
        reward: RewardFunction,
        config: PPOConfig,
        update_rule: UpdateRule,
        arena: AnyArena,
        *,
        seed: int,
        callbacks: Sequence[Callback] = (),
        ranks: Ranks = ONE,
        sharded: Sequence[nn.Module] = (),
    ) -> None:
        if config.microbatch_tokens is not None:
            policy.check_packing()
        self.policy, self.reference, self.generator = policy, reference, generator
        self.sharded = sharded
        """Models whose weights are sharded over the ranks."""
        self.ranks, self.reward = ranks, reward if ranks.size == 1 else DealtReward(reward, ranks)
        self.prompts, self.config, self.seed = prompts, config, seed
        self.update_rule, self.arena, self.callbacks = update_rule, arena, list(callbacks)
        self.trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.meter, self.scale = PeakMeter(policy.device), ScoreScale(config.score_scale)
        self.divergence, self.passes = Divergence(config), Passes(microbatch_size(config), "ppo", ranks)
        self.left_out = 0
        """Sequences of the last rollout that `on_nonfinite` left out."""
        self.kl_coef, self.old_kl_coef = config.kl_coef, config.old_kl_coef
        self.updates_done = self.resumed_at = 0
        self.sampled_at = 0.0
        self._state: Mapping[str, Tensor] | None = None
        self._reference: str | None = None
        self.latest: dict[str, float] = {}
        """Metrics of the last update."""
        self.whole, self.stopped = True, False
        """`whole`: the state is that of `updates_done` updates; False from the first changed weight of an update to its end."""
        update_rule.optimizer.register_step_pre_hook(self._on_change)

    # ---- the loop ----

    def train(self) -> None:
        """Run until `config.updates` are done or a callback has called `stop`.

        Raises:
            Diverged: the metrics of the last updates exceed a limit of `config.stop_on`.
        """
        with Ending(self):
            self.divergence.check()
            while self.updates_done < self.config.updates and not self.stopped:
                self.step()
                self.divergence.check()
            self.divergence.end()

    def step(self) -> dict[str, float]:
        """Run one iteration of Algorithm 1, call the callbacks' `on_update`, and return the metrics.

        An exception before the first change of a weight leaves the state unchanged. A later exception leaves a partial update.

        Raises:
            RuntimeError: after a partial update, until a checkpoint is loaded.
        """
        if not self.whole:
            raise RuntimeError(
                f"update {self.updates_done + 1} failed after it had changed weights; load a checkpoint to continue"
            )
        clock = [time.perf_counter()]
        with self._undone_on_failure():
            rollout = self.collect()
            clock.append(time.perf_counter())
            scored, deviation = self.score(rollout)
            clock.append(time.perf_counter())
            experience, log = advantages(scored, self.config, self.kl_coef, self.policy.backend)
            with self._phase("train"), gradients_in(self.arena, self.trained):
                context = Step(self.updates_done, self.old_kl_coef, self._on_change, self.passes, self._report)
                log |= deviation | {"kl_coef": self.kl_coef} | self.update_rule(experience, context)
            if "left_out_sequences" in log:
                log["left_out_sequences"] += self.left_out
            log |= self.adapt(experience, log)
            self.latest = log  # before the update counts as finished, because `on_end` may write it under that number
            self.updates_done += 1
            self.divergence.add(log, self.updates_done)
            self.whole = True
        log |= self._measured(rollout, scored, clock)
        self.notify("on_update", log)
        return log

    def collect(self) -> Rollout:
        """Sample one response to each of the next prompts, with keys and values in the arena.

        Sharded weights are gathered once for all steps. Random numbers depend on a sequence's number in the run and not on the
        rank that samples it.
        """
        first, count = self.updates_done * self.config.rollout_batch, self.config.rollout_batch
        with self._phase("generate"):
            prompts = self.prompts(first, count)
            shares = self.ranks.shares(torch.tensor([len(prompt) for prompt in prompts]))
            rows = shares[self.ranks.rank]
            with whole(self.policy):
                ours = [prompts[row] for row in rows.tolist()]
                own = self.generator.generate(ours, first + rows, allocate=self.arena.memory)
            self.sampled_at = time.perf_counter()
            return joined(own, self.ranks, shares, self.generator.pad_token_id)

    def score(self, rollout: Rollout) -> tuple[Scored, dict[str, float]]:
        """Score the responses, compute all log-probs, and measure the deviation of the sampled ones."""
        models, first = (self.policy, self.reference, self.reward), self.updates_done * self.config.rollout_batch
        with self._phase("score"):
            means = self.scale, first, self.arena.transients, self.passes
            scored = score(rollout, *models, self.config, self.temperature, *means)
            scored = self._without_nonfinite(scored)
            self.notify("on_rollout", scored)
            return scored, self._deviation(scored)

    def adapt(self, experience: Experience, log: dict[str, float]) -> dict[str, float]:
        """Adapt the KL coefficients to the KLs of this update; return the metrics measured for it."""
        config, found = self.config, {}
        if self.updates_done < config.value_warmup:
            return found
        if config.kl_control == "adaptive":
            kl = log["kl"] if config.kl_unit == "sequence" else log["kl_per_token"]
            sequences = len(experience.rollout)
            aim = {"target": config.kl_target, "horizon": config.kl_horizon, "sequences": sequences}
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, **aim)
        if config.old_kl_target is not None:
            with self._phase("score"), self.arena.transients():
                old_kl = self.passes.fitting(
                    lambda size: old_policy_kl(self.policy, experience, size, self.temperature)
                )
            found = {"old_kl": old_kl, "old_kl_coef": self.old_kl_coef}
            self.old_kl_coef = adapted_old_kl_coef(self.old_kl_coef, old_kl, target=config.old_kl_target)
        return found

    def stop(self) -> None:
        """End training after the current update."""
        self.stopped = True

    def notify(self, event: str, *arguments: Any) -> None:
        """Call the method `event` of every callback that has it."""
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self, *arguments)

    # ---- state ----

    @property
    def temperature(self) -> float:
        """Temperature of sampling, which all log-probs use."""
        return self.generator.config.temperature

    def state(self) -> dict[str, Any]:
        """Return the numbers that a resumed run needs."""
        numbers = {name: getattr(self, name) for name in _NUMBERS} | {"merges": self.generator.merges}
        return numbers | self.update_rule.state() | self.scale.state() | self.divergence.state() | self.passes.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: the run that saved it samples from merged weights and this one does not, or the reverse.
        """
        if state.get("merges", self.generator.merges) != self.generator.merges:
            before, now = ("with" if merges else "without" for merges in (state["merges"], self.generator.merges))
            raise ValueError(
                f"rollout.merge_adapters: the checkpoint is of a run {before} merged adapters, and this run is planned {now}; "
                f"set it to {'always' if state['merges'] else 'never'}"
            )
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self.update_rule.load_state(state)
        self.scale.load_state(state)
        self.divergence.load_state(state)
        self.passes.load_state(state)

    # ---- checkpoints: `rlhf_engine.checkpoint.Checkpointable` ----

    @property
    def done(self) -> int:
        """Number of finished updates."""
        return self.updates_done

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimizer's state by name; inside `gathered`, the first rank has whole tensors."""
        return optimizer_tensors(self.update_rule.optimizer) if self._state is None else dict(self._state)

    @contextmanager
    def gathered(self, folder: Path) -> Iterator[None]:
        """Let the first rank read whole tensors inside the context, mapped from files in `folder`; all ranks must enter."""
        if not self.sharded:
            yield
            return
        from rlhf_engine.distributed.parts import joined_parts

        self.constants()  # gathers the reference at the first call
        try:
            with joined_parts(folder, self.policy, self.tensors(), self.ranks) as self._state:
                yield
        finally:
            self._state = None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the stored tensors of the policy, its value function and the averaged weights.

        With sharded weights, `gathered` must be open for their values.
        """
        yield from self.policy.stored()
        if self.update_rule.average is not None:
            yield from ((f"{EMA}.{name}", weight) for name, weight in self.update_rule.average.model.stored())

    def constants(self) -> Mapping[str, str]:
        """Return the fingerprint of the reference; that of a sharded one is computed once, by all ranks together."""
        from rlhf_engine.checkpoint import fingerprint

        if self._reference is None or not self.sharded:
            self._reference = fingerprint(self.reference.weights())
        return {"reference": self._reference}

    def write_model(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase | None, *, complete: bool | None = None
    ) -> None:
        """Write the policy and its value function, and the averaged weights as a model in the subfolder `ema`.

        Unless `complete`, frozen layers below the trained ones are left out; None: complete after the last update.
        """
        if complete is None:
            complete = self.stopped or self.updates_done >= self.config.updates
        save_policy(folder, self.policy, tokenizer, complete=complete)
        if self.update_rule.average is not None:
            (folder / EMA).mkdir()
            save_policy(folder / EMA, self.update_rule.average.model, tokenizer, complete=complete)

    def load(self, folder: Path, state: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Load a checkpoint.

        Raises:
            ValueError: with the name of a file that is missing or does not fit.
        """
        average = self.update_rule.average
        places = {folder: self.policy} | ({} if average is None else {folder / EMA: average.model})
        for place, policy in places.items():
            check_saved(place, policy)
        for place, policy in places.items():
            copy_weights(place, policy)
        load_optimizer_tensors(self.update_rule.optimizer, tensors, folder / OPTIMIZER)
        self.load_state(state)
        self.whole = True

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        before, done = self.state(), self.updates_done
        self.arena.reset()
        try:
            yield
        finally:
            if self.whole and self.updates_done == done:
                self.load_state(before)
                self.update_rule.optimizer.zero_grad(set_to_none=True)

    def _on_change(self, *_: object) -> None:
        self.whole = False

    # ---- numbers that are not finite ----

    def _report(self, cause: NonFinite) -> None:
        self.notify("on_nonfinite", cause)

    def _without_nonfinite(self, scored: Scored) -> Scored:
        """Return the sequences whose log-probs and values are finite.

        Raises:
            FloatingPointError: some are not and `on_nonfinite` is "stop", or none is left.
        """
        found, self.left_out = bad_scored(scored), 0
        if found is None:
            return scored
        rows, name, what = found
        first = take_scored(scored, scored.rollout.mask.new_tensor(rows[:1], dtype=torch.long))

        def run() -> None:
            with self.arena.transients():
                want = ("logprobs", "values") if self.policy.value is not None else ("logprobs",)
                recompute(self.policy, first.rollout, want, temperature=self.temperature, **self.passes.size)

        # Ranks would find different operations, and run different passes.
        op = (first_nonfinite(self.policy, {}, run) if self.ranks.size == 1 else None) or name
        numbers = numbers_of(scored.rollout, rows)
        every = [row for row in range(len(scored.rollout)) if row not in rows]
        advice = "check the weights of the reference" if op == "ref_logprobs" else LOWER_RATE
        what = f"training diverged: {what}"
        cause = NonFinite(what, numbers, op, self.updates_done + 1, first, {}, advice=advice)
        self._report(cause)
        if self.config.on_nonfinite == "stop" or not every:
            raise FloatingPointError(str(cause))
        notice(f"{cause}; these sequences are left out (ppo.on_nonfinite)")
        self.left_out = len(rows)
        return take_scored(scored, scored.rollout.mask.new_tensor(every, dtype=torch.long))

    # ---- measurements ----

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        # The arena first frees the previous phase's memory.
        with self.arena.phase(name), self.meter.phase(name), record_function(PHASE + name):
            yield

    def _deviation(self, scored: Scored) -> dict[str, float]:
        """Return the deviation of sampled log-probs from a forward pass of the policy, which has not changed since sampling."""
        rollout, count = scored.rollout, self.generator.config.check_sequences
        if self.config.old_logprobs == "rescored":
            return {"logprob_deviation": float((scored.old_logprobs - rollout.logprobs).abs().max())}
        if count == 0:
            return {}
        size = self.passes.size
        with self.arena.transients():
            found = logprob_deviation(self.policy, rollout, sequences=count, temperature=self.temperature, **size)
        return {"logprob_deviation": found}

    def _measured(self, rollout: Rollout, scored: Scored, clock: list[float]) -> dict[str, float]:
        start, collected, scored_at = clock
        now, tokens = time.perf_counter(), int(rollout.mask.sum())
        skipped = {"scores_skipped": len(rollout) - len(scored.rollout) - self.left_out}
        sampling = self.ranks.each(self.sampled_at - start)
        idle = {"idle_share": 1.0 - sum(sampling) / (len(sampling) * max(sampling))}
        return {
            **(skipped if self.config.nonfinite_scores == "skip" else {}),
            **(idle if self.ranks.size > 1 else {}),
            "seconds_collect": collected - start,
            "seconds_score": scored_at - collected,
            "seconds_update": now - scored_at,
            "tokens_per_second": tokens / (now - start),
            "sampled_tokens_per_second": tokens / (collected - start),
            **self.generator.metrics(),
            **self.arena.metrics(),
            **self.meter.log(),
            "peak_rss_mb": peak_rss_mb(),
        }
