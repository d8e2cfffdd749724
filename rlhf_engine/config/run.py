"""All sections of a run, and the rules that join several of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf_engine.config.data import DataConfig
from rlhf_engine.config.evaluate import EvalConfig
from rlhf_engine.config.iterate import IterateConfig
from rlhf_engine.config.memory import MemoryConfig
from rlhf_engine.config.model import ModelConfig
from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.ppo import PPOConfig
from rlhf_engine.config.reward import RewardConfig
from rlhf_engine.config.rollout import RolloutConfig
from rlhf_engine.config.schema import Section, Seed
from rlhf_engine.config.sft import SFTConfig


@dataclass(frozen=True)
class RunConfig(Section):
    """A whole run: where it happens and the settings of every stage."""

    seed: Seed = 0
    """Seed of initialisation, data order and sampling."""
    output_dir: str = "runs/default"
    """Folder that receives checkpoints, metrics.jsonl, tensorboard/ and plots/."""
    device: str = "cpu"
    """torch device of the models, such as cpu or cuda:0."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights. In bfloat16 gradients are summed in float32 and the optimiser steps float32 masters: weights,
    gradients and masters take 10 bytes a parameter, where float32 takes 8; what is saved are activations, copies and time."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products, of sampling as of learning, where the weights are float32: bfloat16 multiplies rounded
    copies of weights and activations, and leaves weights, gradients, log-probs, values and optimiser in float32. It pays on
    GPUs and on processors with bfloat16 instructions; on others it is slower than float32."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Backend of the rlhf_kernels operations; `auto` picks one for each of them and the device."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data set."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Supervised fine-tuning."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """The reward model."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Reinforcement learning."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Where the bytes live."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """A contest of two models."""
    iterate: IterateConfig = field(default_factory=IterateConfig)
    """Rounds of the whole procedure."""

    def optimizers(self) -> dict[str, OptimConfig]:
        """Return the optimiser settings of every stage by the key of its section."""
        return {"sft": self.sft.optim, "reward": self.reward.optim, "ppo": self.ppo.optim}

    def check(self) -> None:
        """float16 is refused: without a scaled loss, gradients below 6e-8 are 0 in it.

        An option that nothing would read is refused, across sections as well.
        """
        if self.dtype == "float16":
            raise ValueError(
                "dtype: got 'float16', expected 'float32' or 'bfloat16'; gradients below 6e-8 are 0 in float16, and there is "
                "no scaling of the loss"
            )
        if self.dtype == "bfloat16" and self.ppo.objective == "trpo":
            raise ValueError(
                "dtype: got 'bfloat16' with ppo.objective 'trpo', expected 'float32': its line search writes weights and no "
                "masters"
            )
        if self.model.attention == "flash_attention_2" and not self.device.startswith("cuda"):
            raise ValueError(
                f"model.attention: got 'flash_attention_2' with device {self.device!r}, expected 'sdpa' or 'eager': "
                "flash-attn runs on CUDA devices alone"
            )
        raw = [name for name, optim in self.optimizers().items() if optim.eps_form == "raw"]
        if self.memory.optimizer_state == "8bit" and raw:
            raise ValueError(
                f"{raw[0]}.optim.eps_form: got 'raw', expected 'corrected' with memory.optimizer_state '8bit': torchao would "
                "compile a step for each of its epsilons"
            )
        if not self.output_dir.strip():
            raise ValueError(f"output_dir: got {self.output_dir!r}, expected a folder")
        if self.compute_dtype == "bfloat16" and self.ppo.objective == "trpo":
            raise ValueError(
                "compute_dtype: got 'bfloat16' with ppo.objective 'trpo', expected 'float32': conjugate gradient divides by "
                "curvatures that bfloat16's rounding would drown"
            )
        rollout = self.rollout
        filtered = (rollout.top_k, rollout.top_p, rollout.min_p) != (None,) * 3 or rollout.repetition_penalty != 1.0
        if self.ppo.importance_cap is not None and self.ppo.old_logprobs == "sampled" and not filtered:
            raise ValueError(
                f"ppo.importance_cap: got {self.ppo.importance_cap}, expected None without rollout.top_k, top_p, min_p or "
                "repetition_penalty, where every weight is 1; ppo.old_logprobs 'rescored' reads it too"
            )
