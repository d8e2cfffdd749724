"""TRL's `PPOConfig` and `PPOTrainer` (1.12.0) on this engine: a script changes one import.

    from rlhf_engine.compat.trl import PPOConfig, PPOTrainer

Constructor, fields, callbacks and logged metrics have TRL's names, and an update is TRL's: see `trl_rollout` and `trl_update`.
The engine's sampler, fused head, GAE kernel, optimizer and memory arena compute it. TRL need not be installed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    get_scheduler,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer import DEFAULT_CALLBACKS, DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler, PrinterCallback

from rlhf_engine.compat import trl_checkpoint
from rlhf_engine.compat.trl_arguments import check_arguments, count_batches
from rlhf_engine.compat.trl_completions import completions, report
from rlhf_engine.compat.trl_config import PPOConfig
from rlhf_engine.compat.trl_roles import (
    AdapterDisabled,
    PolicyAndValue,
    SeparateReference,
    actor_critic,
    adapted_value,
    is_adapted,
    reward_of,
    with_adapter,
)
from rlhf_engine.compat.trl_rollout import Responses, Sampler, score_batch, unpadded
from rlhf_engine.compat.trl_update import Update
from rlhf_engine.config import OptimConfig
from rlhf_engine.memory import AnyArena, open_arena
from rlhf_engine.model import FrozenCopy
from rlhf_engine.model.roles import Reference
from rlhf_engine.optim.adamw import Optimizer, Resident
from rlhf_engine.optim.build import build_optimizer
from rlhf_engine.ppo.build import head_bytes, phase_bytes

__all__ = ["PPOConfig", "PPOTrainer"]


@dataclass
class OnlineTrainerState(TrainerState):
    """The state that callbacks read, with the number of sampled responses."""

    episode: int = 0


class PPOTrainer:
    """PPO with the constructor, callbacks and metrics of TRL 1.12.0's `PPOTrainer`.

    The models are trained in place. What TRL's trainer does not have: checkpoints from which `train` resumes, the value model
    in every saved folder, and adapters for the value model (`value_peft_config`).

    Args:
        args: the settings.
        processing_class: the tokenizer. Its pad id separates prompts and responses from padding, so it must be set.
        model: the policy, a causal language model of transformers, possibly wrapped by peft.
        ref_model: the reference of the KL penalty. None: the policy without its adapter, or else a frozen copy of it.
        reward_model: a sequence classifier with one label, which scores each response at its last token.
        train_dataset: rows with the token ids `input_ids` of a prompt.
        value_model: a sequence classifier with one label.
        data_collator: creates a batch with `input_ids` from rows. None: `DataCollatorWithPadding`.
        eval_dataset: rows of which `generate_completions` prints responses.
        optimizers: an optimizer of all trained parameters and its learning-rate scheduler; each may be None.
        callbacks: callbacks of transformers, in addition to its default ones.
        peft_config: a config of peft; the policy gets such an adapter, and only the adapter is trained.
        value_peft_config: the same for the value model, whose layer `score` is trained too.

    Raises:
        ValueError: a model, the tokenizer or a setting does not fit; the message has the argument or field.
    """

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: nn.Module,
        ref_model: nn.Module | None,
        reward_model: nn.Module,
        train_dataset: Any,
        value_model: nn.Module,
        data_collator: Any = None,
        eval_dataset: Any = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        value_peft_config: Any = None,
    ) -> None:
        check_arguments(args, processing_class, model, ref_model, train_dataset, eval_dataset)
        count_batches(args, len(train_dataset))
        self.args, self.processing_class = args, processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_collator = DataCollatorWithPadding(processing_class) if data_collator is None else data_collator
        eos_id = processing_class.eos_token_id
        self.stop_token_id = cast("int | None", eos_id if args.stop_token == "eos" else args.stop_token_id)
        self.pad_id, self.eos_id = (
            cast("int", processing_class.pad_token_id),
            cast("int", processing_class.eos_token_id),
        )

        device = args.device
        self.policy_model = model if peft_config is None else with_adapter(model, peft_config, "peft_config")
        self.value_model = value_model if value_peft_config is None else adapted_value(value_model, value_peft_config)
        self.reward_model, self.ref_model = reward_model, ref_model
        for one in (self.policy_model, self.value_model, self.reward_model, self.ref_model):
            if one is not None:
                one.to(device)
        dtype = torch.bfloat16 if args.bf16 else None
        self.policy = actor_critic(
            self.policy_model,
            self.value_model,
            compute_dtype=dtype,
            gradient_checkpointing=bool(args.gradient_checkpointing),
        )
        self.reference = self._make_reference(dtype)
        self.reward = reward_of(self.reward_model)
        self.model = PolicyAndValue(self.policy_model, self.value_model)

        self.optimizer, self.lr_scheduler = self._make_optimizer(*optimizers)
        self.update = Update(self.policy, self.optimizer, args)
        self._begin_data()
        self._samples_every = max(1, cast("int", args.num_total_batches) // max(1, args.num_sample_generations))
        self.sampler = self._make_sampler(args.sampling_temperature)
        self.arena: AnyArena | None = None
        self._add_callbacks(callbacks or [])

    # ---- training ----

    def train(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """Run all updates, or those that a checkpoint has left.

        Args:
            resume_from_checkpoint: the folder of a checkpoint; True is the newest one in `output_dir`. None:
                `args.resume_from_checkpoint`.

        Raises:
            ValueError: the folder has no checkpoint, or one of a different run.
            FloatingPointError: a gradient is not finite.
        """
        args, done = self.args, 0
        resume = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        self._begin_state()
        if resume:
            done = self._resume(trl_checkpoint.find(resume, cast("str", args.output_dir)))
        start, before = time.time(), self.state.episode
        self.control = self.callback_handler.on_train_begin(args, self.state, self.control)
        for number in range(done, cast("int", args.num_total_batches)):
            self.state.episode += cast("int", args.batch_size)
            metrics = self._update(number)
            speed = int((self.state.episode - before) / (time.time() - start))
            self._log({"eps": speed} | metrics)
            self.lr_scheduler.step()
            self.control = self.callback_handler.on_step_end(args, self.state, self.control)
            self._save_if_due()
            if args.num_sample_generations > 0 and number % self._samples_every == 0:
                self.generate_completions(sampling=True)
            if self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        self._save_if_due()

    def sample(self, prompts: list[Tensor], number: int) -> Responses:
        """Return a response to each prompt of update `number`, with its log-probs."""
        first = number * len(prompts)
        return self.sampler(prompts, torch.arange(first, first + len(prompts)), self.arena)

    def _update(self, number: int) -> dict[str, float]:
        """Run one update; return its metrics."""
        prompts = unpadded(self.batches.next()["input_ids"].to(self.args.device), self.pad_id)
        self.arena = arena = self._arena_for(prompts)
        responses = self.sample(prompts, number)
        batch = score_batch(
            responses,
            self.args,
            policy=self.policy,
            reference=self.reference,
            reward=self.reward,
            stop_id=self.stop_token_id,
            pad_id=self.pad_id,
            eos_id=self.eos_id,
            arena=arena,
        )
        trained = self.update(batch, arena, last_of_pass=self.batches.last_of_pass)
        objective = {name: value.item() for name, value in batch.metrics.items()}
        eos = objective.pop("val/num_eos_tokens")
        rate = self.lr_scheduler.get_last_lr()[0]
        return objective | trained | {"val/num_eos_tokens": eos, "lr": rate, "episode": self.state.episode}

    def _log(self, metrics: dict[str, Any]) -> None:
        """Log the metrics of an update."""
        self.state.epoch = self.state.episode / len(self.train_dataset)
        self.state.global_step += 1
        metrics["epoch"] = self.state.epoch
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, metrics)

    # ---- files ----

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the policy with its tokenizer into a folder, `args.output_dir` by default, and the value model below it.

        The value model is in the subfolder `value_model`. A model with an adapter is written as the adapter.
        """
        folder = Path(cast("str", self.args.output_dir) if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trl_checkpoint.write_models(folder, self.policy_model, self.value_model, self.processing_class)

    def save_checkpoint(self) -> Path:
        """Write a checkpoint from which `train` resumes, and return its folder, `args.output_dir/checkpoint-N`."""
        folder = Path(cast("str", self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        trl_checkpoint.save(
            folder,
            policy=self.policy_model,
            value_model=self.value_model,
            tokenizer=self.processing_class,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            state=self.state,
            batches=self.batches,
            keep=self.args.save_total_limit,
        )
        return folder

    def generate_completions(self, sampling: bool = False) -> dict[str, list[Any]]:
        """Sample responses to the evaluation prompts at temperature 0.01, print five of them, and return all with their scores.

        With `sampling`, only the first batch is used. Without an `eval_dataset` the result is empty. If "wandb" is in
        `args.report_to`, the table is also logged there.
        """
        if self.eval_dataset is None:
            return {}
        loader = DataLoader(
            self.eval_dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.data_collator,
            drop_last=True,
        )
        sampler = self._make_sampler(0.01 + 1e-7)
        table = completions(
            sampler,
            self.reward,
            loader,
            self.processing_class,
            chunk=self.args.local_rollout_forward_batch_size,
            first_batch_only=sampling,
        )
        report(table, cast("list[str]", self.args.report_to))
        return table

    # ---- callbacks ----

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Add a callback of transformers, or a class of one."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> TrainerCallback | None:
        """Remove a callback and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """Remove a callback."""
        self.callback_handler.remove_callback(callback)

    def _add_callbacks(self, callbacks: list[TrainerCallback]) -> None:
        every = [*DEFAULT_CALLBACKS, *get_reporting_integration_callbacks(self.args.report_to), *callbacks]
        inner = getattr(self.optimizer, "inner", self.optimizer)
        self.callback_handler = CallbackHandler(every, self.model, self.processing_class, inner, self.lr_scheduler)
        self.add_callback(PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        self.control, self.state = TrainerControl(), OnlineTrainerState()

    def _save_if_due(self) -> None:
        if self.control.should_save:
            self.save_checkpoint()
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    # ---- construction ----

    def _make_reference(self, compute_dtype: torch.dtype | None) -> Reference:
        if self.ref_model is not None:
            return SeparateReference(self.ref_model, compute_dtype=compute_dtype)
        if is_adapted(self.policy_model):
            return AdapterDisabled(self.policy, self.policy_model)
        return FrozenCopy(self.policy)

    def _make_optimizer(self, optimizer: torch.optim.Optimizer | None, scheduler: Any) -> tuple[Optimizer, Any]:
        args = self.args
        if optimizer is None:
            betas = (args.adam_beta1, args.adam_beta2)
            settings = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
            config = OptimConfig(**settings, weight_decay=args.weight_decay, max_grad_norm=None)
            ours = build_optimizer(self.policy, config, args.optimizer_state)
        else:
            ours = Resident(optimizer)
        if scheduler is None:
            total = cast("int", args.num_total_batches)
            scheduler = get_scheduler(
                args.lr_scheduler_type,
                optimizer=cast("torch.optim.Optimizer", getattr(ours, "inner", ours)),
                num_warmup_steps=args.get_warmup_steps(total),
                num_training_steps=total,
                scheduler_specific_kwargs=cast("dict[str, Any] | None", args.lr_scheduler_kwargs),
            )
        return ours, scheduler

    def _begin_data(self) -> None:
        """Create the batches and seed torch's global generator, from which they draw their order, as TRL does."""
        torch.manual_seed(self.args.seed)
        self.batches = trl_checkpoint.Batches(
            DataLoader(
                self.train_dataset,
                batch_size=cast("int", self.args.local_batch_size),
                shuffle=True,
                collate_fn=self.data_collator,
                drop_last=True,
            )
        )

    def _make_sampler(self, temperature: float) -> Sampler:
        return Sampler(
            self.policy,
            length=self.args.response_length,
            temperature=temperature,
            stop_id=self.stop_token_id,
            pad_id=self.pad_id,
            seed=self.args.seed,
            together=self.args.local_rollout_forward_batch_size,
            tokenizer=self.processing_class,
        )

    def _arena_for(self, prompts: list[Tensor]) -> AnyArena:
        """Return an arena in which these prompts are sampled, scored and trained on."""
        if not self.sampler.fit(prompts) and self.arena is not None:
            return self.arena
        generator = self.sampler.generator
        assert generator is not None
        self.arena = None  # frees its memory before the new one is created
        sizes = phase_bytes(self.policy, generator, self.optimizer)
        arena = open_arena(self.policy.device, sizes, head_bytes(self.policy))
        self.optimizer.allocate_from(arena.take)
        return arena

    def _begin_state(self) -> None:
        """Reset the counters of the run, with the intervals in updates that are given as shares of it."""
        args, total = self.args, cast("int", self.args.num_total_batches)
        self.state = OnlineTrainerState(max_steps=total, stateful_callbacks=[])
        self.state.num_train_epochs = cast("int", args.total_episodes) / len(self.train_dataset)  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(args, name)
            if value is not None:
                setattr(self.state, name, math.ceil(total * value) if value < 1 else value)

    def _resume(self, folder: Path) -> int:
        """Load a checkpoint; return the number of finished updates."""
        fields = trl_checkpoint.load(
            folder,
            policy=self.policy_model,
            value_model=self.value_model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            batches=self.batches,
        )
        for name in ("global_step", "episode", "epoch", "log_history", "total_flos", "best_metric"):
            setattr(self.state, name, fields[name])
        return self.state.global_step
