"""The numbers of a run's config that decide its memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch

from rlhf_engine.config import RolloutConfig, RunConfig
from rlhf_engine.config.memory import byte_count
from rlhf_engine.model.top_layers import check_layers
from rlhf_engine.model.upcast import upcasts
from rlhf_engine.planner.model_shape import ModelShape, RecurrentShape, UnknownMemoryError
from rlhf_engine.rollout.decode import is_paged


@dataclass(frozen=True)
class Workload:
    """A PPO run: models, lengths, batches, and where state is stored. Every sequence counts with its maximum length."""

    policy: ModelShape
    reward: ModelShape | None
    """Shape of the reward model; None if a Python function computes the scores."""
    prompt: int
    response: int
    rollout_batch: int
    minibatch: int
    microbatch: int
    slots: int
    """Most sequences that are decoded together."""
    prefill_tokens: int = RolloutConfig.prefill_tokens
    """Most prompt tokens in one forward pass, padding included."""
    microbatch_tokens: int | None = None
    """Tokens of a micro-batch, instead of `microbatch` sequences."""
    device: str = "cpu"
    eager: bool = False
    dtype: str = "float32"
    compute_dtype: str = "float32"
    value: str = "head"
    """Source of the values: "head", "backbone" or "none"."""
    cache: str = "auto"
    """Value of the setting `rollout.cache`."""
    average: bool = False
    """Whether a moving average of the weights is kept."""
    pretraining: int = 0
    """Pretraining sequences per optimizer step."""
    optimizer_state: str = "resident"
    gradient_checkpointing: bool = False
    budget: int | None = None
    adapter: int = 0
    """Rank of the adapters on every matrix of the layers, which are trained instead of it; 0: none. All of them share the
    frozen weights of the policy, and the reference is the policy without its adapter."""
    reward_adapter: bool = False
    """Whether the reward model of a run with adapters is one on the weights of the policy."""
    reference_adapter: bool = False
    """Whether the reference has an adapter, because the policy starts from one."""
    reference: str = "auto"
    """Value of the setting `ppo.reference`."""
    reference_memory: str = "device"
    """Value of the setting `memory.reference`."""
    merge_adapters: str = "never"
    """Value of the setting `rollout.merge_adapters`; `MemoryPlan` replaces "auto" by "always" or "never"."""
    train_layers: int | None = None
    """Number of the policy's top layers that are trained or have adapters; None: all."""
    quant: str = "none"
    """Value of the setting `model.quant`."""
    gpu: str = ""
    """Key of `gpus.GPUS` whose speeds are assumed; empty: those of `device` in general."""
    config: RunConfig = field(default_factory=RunConfig, repr=False)
    """Config of the run. Settings that do not affect memory may still exclude a strategy."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        policy: ModelShape,
        reward: ModelShape | None,
        *,
        reward_adapter: bool = False,
        reference_adapter: bool = False,
    ) -> Self:
        """Return the workload of `rlhf ppo`; the adapters are those of the fields with the same names.

        Raises:
            ValueError: the longest sequence exceeds the context of a model, the model has fewer layers than are trained, or the
                weights are quantised and no adapter is trained.
            UnknownMemoryError: the objective is TRPO, or a recurrent model is quantised or only its top layers are trained.
        """
        config.check_training()
        ppo, rollout, memory = config.ppo, config.rollout, config.memory
        if ppo.objective == "trpo":
            raise UnknownMemoryError(
                "ppo.objective: got 'trpo', whose memory the plan does not know; set a different objective"
            )
        if config.model.train_layers is not None:
            check_layers(config.model.train_layers, policy.layers, "the model")
            policy.top(config.model.train_layers)
        if config.model.quant != "none" and any(isinstance(one, RecurrentShape) for one in (policy, reward)):
            raise UnknownMemoryError(
                f"model.quant: got {config.model.quant!r} for a model with recurrent states, whose memory the plan does not "
                "know; unset memory.budget to run without a plan"
            )
        if memory.reference == "host" and isinstance(policy, RecurrentShape):
            raise UnknownMemoryError(
                "memory.reference: got 'host' for a model with recurrent states, whose memory the plan does not know; set it "
                "to device, or unset memory.budget to run without a plan"
            )
        # A response that reaches its maximum length is scored with an EOS token appended.
        room = policy.positions if reward is None else min(policy.positions, reward.positions - 1)
        if rollout.max_prompt_tokens + rollout.max_response_tokens > room:
            raise ValueError(
                f"rollout: got max_prompt_tokens {rollout.max_prompt_tokens} and max_response_tokens "
                f"{rollout.max_response_tokens}, expected at most {room} together, the models' positions"
            )
        return cls(
            policy=policy,
            reward=reward,
            prompt=rollout.max_prompt_tokens,
            response=rollout.max_response_tokens,
            rollout_batch=ppo.rollout_batch,
            minibatch=ppo.minibatch,
            microbatch=ppo.microbatch,
            microbatch_tokens=ppo.microbatch_tokens,
            slots=min(rollout.batch_size, ppo.rollout_batch),
            prefill_tokens=rollout.prefill_tokens,
            device=config.device.partition(":")[0],
            eager=config.model.attention == "eager",
            dtype=config.dtype,
            compute_dtype=config.compute_dtype,
            value="none" if ppo.baseline == "none" else ppo.value_model,
            cache=rollout.cache,
            average=ppo.ema_decay is not None,
            pretraining=round(ppo.ptx_ratio * ppo.minibatch) if ppo.ptx_coef else 0,
            optimizer_state=memory.optimizer_state,
            gradient_checkpointing=memory.gradient_checkpointing,
            adapter=config.adapter.rank,
            merge_adapters=rollout.merge_adapters if config.adapter.rank else "never",
            train_layers=config.model.train_layers,
            quant=config.model.quant,
            reward_adapter=reward_adapter,
            reference_adapter=reference_adapter,
            reference=ppo.reference,
            reference_memory=memory.reference,
            budget=None if memory.budget is None else byte_count(memory.budget, "memory.budget"),
            config=config,
        )

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return getattr(torch, self.dtype)

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the factors of a matrix product."""
        return min(self.weight_dtype, getattr(torch, self.compute_dtype), key=lambda dtype: dtype.itemsize)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return self.weight_dtype.itemsize

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element of a matrix product's factors."""
        return self.product_dtype.itemsize

    @property
    def autocast(self) -> bool:
        """Whether products use rounded copies of the weights."""
        return self.compute_bytes < self.weight_bytes

    @property
    def top_layers(self) -> int:
        """Number of the policy's layers that are trained or have adapters."""
        return self.policy.layers if self.train_layers is None else self.train_layers

    @property
    def shares_states(self) -> bool:
        """Whether the output of the policy's frozen layers is stored for the reference and the passes of training."""
        shared = self.reference == "hydra" or (self.reference == "auto" and not self.adapter)
        return self.top_layers < self.policy.layers and shared

    @property
    def copies_reference(self) -> bool:
        """Whether the reference has its own copy of what the policy trains."""
        return not self.adapter or self.reference_adapter or self.reference == "frozen_copy"

    @property
    def factor_bytes(self) -> int:
        """Bytes of one element of a dequantised weight."""
        return torch.float32.itemsize if upcasts(self.product_dtype, self.device) else self.compute_bytes

    @property
    def paged(self) -> bool:
        """Whether keys and values are stored in pages."""
        return not isinstance(self.policy, RecurrentShape) and is_paged(self.cache, self.device)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.response

    @property
    def train_rows(self) -> int:
        """Sequences of a micro-batch in which all have the maximum length."""
        if self.microbatch_tokens is None:
            return self.microbatch
        return max(1, min(self.minibatch, self.microbatch_tokens // (self.length - 1)))

    def pass_tokens(self, batch: int) -> int:
        """Return the most inputs in one pass over a part of `batch` sequences. Short sequences can fill a token budget too."""
        if self.microbatch_tokens is None:
            return self.microbatch * (self.length - 1)
        return max(self.length - 1, min(self.microbatch_tokens, batch * (self.length - 1)))

    def pass_actions(self, batch: int) -> int:
        """Return the most actions in one pass over a part of `batch` sequences.

        With a token budget nearly every token can be an action, because prompts can be short.
        """
        if self.microbatch_tokens is None:
            return self.microbatch * self.response
        return max(self.response, min(self.microbatch_tokens, batch * self.response))
