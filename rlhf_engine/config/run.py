"""All sections of a run, and the rules that involve several sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from rlhf_engine.config.adapter import AdapterConfig
from rlhf_engine.config.checkpoint import CheckpointConfig
from rlhf_engine.config.data import DataConfig
from rlhf_engine.config.distributed import DistributedConfig
from rlhf_engine.config.evaluate import EvalConfig
from rlhf_engine.config.hints import hint
from rlhf_engine.config.http import HttpConfig
from rlhf_engine.config.iterate import IterateConfig
from rlhf_engine.config.memory import MemoryConfig
from rlhf_engine.config.model import ModelConfig
from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.ppo import PPOConfig
from rlhf_engine.config.reward import RewardConfig
from rlhf_engine.config.rollout import RolloutConfig
from rlhf_engine.config.schema import Section, Seed, UnknownKeyError, shortened
from rlhf_engine.config.sft import SFTConfig
from rlhf_engine.config.tracking import TrackingConfig


@dataclass(frozen=True)
class RunConfig(Section):
    """Settings of a whole run: device, output folder and every stage."""

    seed: Seed = 0
    """Seed of initialization, data order and sampling."""
    output_dir: str = "runs/default"
    """Folder for checkpoints, metrics.jsonl, tensorboard/ and plots/."""
    device: str = "cpu"
    """torch device of the models, such as cpu or cuda:0."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights. With bfloat16, gradients are accumulated in float32 and the optimizer updates float32
    masters. Weights, gradients and masters then need 10 bytes per parameter instead of 8 with float32, but activations
    and copies of the model need less memory, and training takes less time. float16 is not supported."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products in sampling and training if the weights are float32. With bfloat16, products use rounded
    copies of weights and activations; weights, gradients, log-probs, values and optimizer state remain float32. It is
    faster on GPUs and on processors with bfloat16 instructions, and slower than float32 on other processors."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of the operations of rlhf_kernels; auto selects one for each operation and device."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """Low-rank adapters that are trained instead of the model's weights."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data sets."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Supervised fine-tuning."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The reward, and training of the reward model."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling of responses."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Reinforcement learning with PPO, TRPO or a policy gradient."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Device memory."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """More than one process."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints of the stages."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Trackers of experiments."""
    http: HttpConfig = field(default_factory=HttpConfig)
    """Requests to servers of rewards and judges."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Comparison of two models (`rlhf eval`)."""
    iterate: IterateConfig = field(default_factory=IterateConfig)
    """Rounds of generate, rank, reward model and PPO (`rlhf iterate`)."""

    @classmethod
    def from_dict(cls, given: dict[str, Any], key: str = "") -> Self:
        """Build the config; the error for an unknown key suggests keys of any section.

        Raises:
            ValueError: as `Section.from_dict`.
        """
        try:
            return super().from_dict(given, key)
        except UnknownKeyError as error:
            raise ValueError(f"unknown key {shortened(repr(error.path), 200)}{hint(error.path, cls.keys())}") from None

    def optimizers(self) -> dict[str, OptimConfig]:
        """Return the optimizer settings of every stage by the name of its section."""
        return {"sft": self.sft.optim, "reward": self.reward.optim, "ppo": self.ppo.optim}

    def check_training(self) -> None:
        """Raise ValueError for settings with which no stage can train; other commands allow them."""
        if self.model.quant != "none" and not self.adapter.rank:
            raise ValueError(
                f"model.quant: got {self.model.quant!r} with adapter.rank 0, expected 'none': quantised weights cannot be "
                "trained; set adapter.rank to train an adapter on them"
            )

    def check(self) -> None:
        """Raise ValueError for options of different sections that contradict each other or that nothing reads.

        float16 is an error, because without loss scaling, gradients below 6e-8 become 0.
        """
        if self.dtype == "float16":
            raise ValueError(
                "dtype: got 'float16', expected 'float32' or 'bfloat16'; gradients below 6e-8 are 0 in float16, and loss "
                "scaling is not implemented"
            )
        if self.dtype == "bfloat16" and self.ppo.objective == "trpo":
            raise ValueError(
                "dtype: got 'bfloat16' with ppo.objective 'trpo', expected 'float32': its line search writes the weights "
                "and does not update float32 masters"
            )
        if self.model.attention == "flash_attention_2" and not self.device.startswith("cuda"):
            raise ValueError(
                f"model.attention: got 'flash_attention_2' with device {self.device!r}, expected 'sdpa' or 'eager': "
                "flash-attn runs only on CUDA devices"
            )
        raw = [name for name, optim in self.optimizers().items() if optim.eps_form == "raw"]
        if self.memory.optimizer_state == "8bit" and raw:
            raise ValueError(
                f"{raw[0]}.optim.eps_form: got 'raw', expected 'corrected' with memory.optimizer_state '8bit': torchao would "
                "compile the step again for every value of epsilon"
            )
        if self.model.quant != "none" and self.rollout.merge_adapters == "always":
            raise ValueError(
                f"rollout.merge_adapters: got 'always' with model.quant {self.model.quant!r}, expected 'auto' or 'never': an "
                "adapter cannot be added to quantised weights"
            )
        if not self.output_dir.strip():
            raise ValueError(f"output_dir: got {self.output_dir!r}, expected the path of a folder")
        if self.compute_dtype == "bfloat16" and self.ppo.objective == "trpo":
            raise ValueError(
                "compute_dtype: got 'bfloat16' with ppo.objective 'trpo', expected 'float32': conjugate gradient divides by "
                "curvatures that are smaller than the rounding error of bfloat16"
            )
        rollout = self.rollout
        filtered = (rollout.top_k, rollout.top_p, rollout.min_p) != (None,) * 3 or rollout.repetition_penalty != 1.0
        corrected = {"importance_cap": self.ppo.importance_cap, "importance.level": self.ppo.importance.level}
        for name, unused in (("importance_cap", None), ("importance.level", "none")):
            if corrected[name] != unused and self.ppo.old_logprobs == "sampled" and not filtered:
                raise ValueError(
                    f"ppo.{name}: got {corrected[name]}, expected {unused}: without rollout.top_k, top_p, min_p or "
                    "repetition_penalty every weight is 1, unless ppo.old_logprobs is 'rescored'"
                )
