"""Every setting of a run: frozen dataclasses, one file per section, YAML in and out.

`load_config(path, overrides=["ppo.kl_coef=0.05"])` reads a file, applies command-line overrides and checks names,
types and ranges. Defaults are InstructGPT's where the paper gives a value.
"""

from rlhf_engine.config.data import DataConfig
from rlhf_engine.config.demo import DemoConfig, FigureConfig
from rlhf_engine.config.evaluate import EvalConfig
from rlhf_engine.config.files import flat_settings, load_config, refuse_overrides, save_config
from rlhf_engine.config.hygiene import HygieneConfig
from rlhf_engine.config.iterate import IterateConfig
from rlhf_engine.config.memory import MemoryConfig, byte_count
from rlhf_engine.config.model import ModelConfig
from rlhf_engine.config.optim import OptimConfig
from rlhf_engine.config.ppo import PPOConfig, TRPOConfig
from rlhf_engine.config.reward import RewardConfig
from rlhf_engine.config.rollout import RolloutConfig
from rlhf_engine.config.run import RunConfig
from rlhf_engine.config.sft import SFTConfig

__all__ = [
    "DataConfig",
    "DemoConfig",
    "EvalConfig",
    "FigureConfig",
    "HygieneConfig",
    "IterateConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "TRPOConfig",
    "byte_count",
    "flat_settings",
    "load_config",
    "refuse_overrides",
    "save_config",
]
