"""Every setting of a run: frozen dataclasses, one file per section, read from and written to YAML.

`load_config(path, overrides=["ppo.kl_coef=0.05"])` reads a file, applies command-line overrides and checks names,
types and ranges. Defaults are InstructGPT's where the paper gives a value.
"""

from typing import TYPE_CHECKING

from rlhf_engine._lazy import exports

if TYPE_CHECKING:
    from rlhf_engine.config.adapter import AdapterConfig as AdapterConfig
    from rlhf_engine.config.checkpoint import CheckpointConfig as CheckpointConfig
    from rlhf_engine.config.data import DataConfig as DataConfig
    from rlhf_engine.config.distributed import DistributedConfig as DistributedConfig
    from rlhf_engine.config.evaluate import EvalConfig as EvalConfig
    from rlhf_engine.config.files import flat_settings as flat_settings
    from rlhf_engine.config.files import load_config as load_config
    from rlhf_engine.config.files import load_saved_config as load_saved_config
    from rlhf_engine.config.files import refuse_overrides as refuse_overrides
    from rlhf_engine.config.files import save_config as save_config
    from rlhf_engine.config.http import HttpConfig as HttpConfig
    from rlhf_engine.config.hygiene import HygieneConfig as HygieneConfig
    from rlhf_engine.config.importance import ImportanceConfig as ImportanceConfig
    from rlhf_engine.config.iterate import IterateConfig as IterateConfig
    from rlhf_engine.config.limits import LimitsConfig as LimitsConfig
    from rlhf_engine.config.memory import MemoryConfig as MemoryConfig
    from rlhf_engine.config.memory import byte_count as byte_count
    from rlhf_engine.config.model import ModelConfig as ModelConfig
    from rlhf_engine.config.optim import OptimConfig as OptimConfig
    from rlhf_engine.config.ppo import PPOConfig as PPOConfig
    from rlhf_engine.config.reward import RewardConfig as RewardConfig
    from rlhf_engine.config.rollout import RolloutConfig as RolloutConfig
    from rlhf_engine.config.run import RunConfig as RunConfig
    from rlhf_engine.config.sft import SFTConfig as SFTConfig
    from rlhf_engine.config.tracking import TrackingConfig as TrackingConfig
    from rlhf_engine.config.trpo import TRPOConfig as TRPOConfig

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "AdapterConfig": "adapter",
        "CheckpointConfig": "checkpoint",
        "DataConfig": "data",
        "DistributedConfig": "distributed",
        "EvalConfig": "evaluate",
        "flat_settings": "files",
        "load_config": "files",
        "load_saved_config": "files",
        "refuse_overrides": "files",
        "save_config": "files",
        "HttpConfig": "http",
        "HygieneConfig": "hygiene",
        "ImportanceConfig": "importance",
        "IterateConfig": "iterate",
        "LimitsConfig": "limits",
        "MemoryConfig": "memory",
        "byte_count": "memory",
        "ModelConfig": "model",
        "OptimConfig": "optim",
        "PPOConfig": "ppo",
        "TRPOConfig": "trpo",
        "RewardConfig": "reward",
        "RolloutConfig": "rollout",
        "RunConfig": "run",
        "SFTConfig": "sft",
        "TrackingConfig": "tracking",
    },
)
