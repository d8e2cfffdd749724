"""Training of a language model from demonstrations to PPO on one shared backbone.

    policy = load_policy(folder)
    codec = Codec(load_tokenizer(folder))
    prompts = [codec.encode_prompt(text) for text in texts]
    trainer = build_trainer(policy, None, text_reward(function, codec), prompts, RunConfig(...), codec=codec)
    log = trainer.step()

`run_sft`, `run_rm`, `run_ppo`, `run_eval` and `run_iterate` run the commands of `rlhf` with a config. Every name is imported on
first use.
"""

from typing import TYPE_CHECKING

from rlhf_engine._lazy import exports

if TYPE_CHECKING:
    from rlhf_engine.checkpoint import resume as resume
    from rlhf_engine.checkpoint import save_checkpoint as save_checkpoint
    from rlhf_engine.config import AdapterConfig as AdapterConfig
    from rlhf_engine.config import DataConfig as DataConfig
    from rlhf_engine.config import MemoryConfig as MemoryConfig
    from rlhf_engine.config import ModelConfig as ModelConfig
    from rlhf_engine.config import OptimConfig as OptimConfig
    from rlhf_engine.config import PPOConfig as PPOConfig
    from rlhf_engine.config import RewardConfig as RewardConfig
    from rlhf_engine.config import RolloutConfig as RolloutConfig
    from rlhf_engine.config import RunConfig as RunConfig
    from rlhf_engine.config import SFTConfig as SFTConfig
    from rlhf_engine.config import load_config as load_config
    from rlhf_engine.config import save_config as save_config
    from rlhf_engine.data.tokenize import Codec as Codec
    from rlhf_engine.data.tokenize import train_tokenizer as train_tokenizer
    from rlhf_engine.metrics import MetricsWriter as MetricsWriter
    from rlhf_engine.model.actor_critic import ActorCritic as ActorCritic
    from rlhf_engine.model.actor_critic import LanguageModel as LanguageModel
    from rlhf_engine.model.adapters import Adapters as Adapters
    from rlhf_engine.model.heads import ValueHead as ValueHead
    from rlhf_engine.model.pretrained import load_tokenizer as load_tokenizer
    from rlhf_engine.model.references import AdapterOff as AdapterOff
    from rlhf_engine.model.references import FrozenCopy as FrozenCopy
    from rlhf_engine.model.references import Hydra as Hydra
    from rlhf_engine.model.reward_model import RewardModel as RewardModel
    from rlhf_engine.model.roles import Policy as Policy
    from rlhf_engine.model.roles import Reference as Reference
    from rlhf_engine.model.roles import Reward as Reward
    from rlhf_engine.model.roles import ValueFunction as ValueFunction
    from rlhf_engine.model.saving import load_policy as load_policy
    from rlhf_engine.model.saving import save_policy as save_policy
    from rlhf_engine.model.top_layers import train_top as train_top
    from rlhf_engine.ppo.build import build_trainer as build_trainer
    from rlhf_engine.ppo.build import make_generator as make_generator
    from rlhf_engine.ppo.callbacks import Callback as Callback
    from rlhf_engine.ppo.callbacks import Checkpoints as Checkpoints
    from rlhf_engine.ppo.callbacks import EarlyStopping as EarlyStopping
    from rlhf_engine.ppo.callbacks import MetricsLog as MetricsLog
    from rlhf_engine.ppo.ptx import PretrainStream as PretrainStream
    from rlhf_engine.ppo.trainer import PPOTrainer as PPOTrainer
    from rlhf_engine.recipes.evaluate import run_eval as run_eval
    from rlhf_engine.recipes.generate import generate_file as generate_file
    from rlhf_engine.recipes.iterate import run_iterate as run_iterate
    from rlhf_engine.recipes.ppo import reward_function as reward_function
    from rlhf_engine.recipes.ppo import run_ppo as run_ppo
    from rlhf_engine.recipes.reward_model import run_rm as run_rm
    from rlhf_engine.recipes.sft import run_sft as run_sft
    from rlhf_engine.rewards.functions import response_texts as response_texts
    from rlhf_engine.rewards.functions import text_reward as text_reward
    from rlhf_engine.rollout.generator import Generator as Generator
    from rlhf_engine.rollout.rollout import Rollout as Rollout

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "resume": "checkpoint",
        "save_checkpoint": "checkpoint",
        "AdapterConfig": "config",
        "DataConfig": "config",
        "MemoryConfig": "config",
        "ModelConfig": "config",
        "OptimConfig": "config",
        "PPOConfig": "config",
        "RewardConfig": "config",
        "RolloutConfig": "config",
        "RunConfig": "config",
        "SFTConfig": "config",
        "load_config": "config",
        "save_config": "config",
        "Codec": "data.tokenize",
        "train_tokenizer": "data.tokenize",
        "MetricsWriter": "metrics",
        "ActorCritic": "model.actor_critic",
        "LanguageModel": "model.actor_critic",
        "Adapters": "model.adapters",
        "ValueHead": "model.heads",
        "load_tokenizer": "model.pretrained",
        "RewardModel": "model.reward_model",
        "AdapterOff": "model.references",
        "Hydra": "model.references",
        "FrozenCopy": "model.references",
        "Policy": "model.roles",
        "Reference": "model.roles",
        "Reward": "model.roles",
        "ValueFunction": "model.roles",
        "load_policy": "model.saving",
        "save_policy": "model.saving",
        "train_top": "model.top_layers",
        "build_trainer": "ppo.build",
        "make_generator": "ppo.build",
        "Callback": "ppo.callbacks",
        "Checkpoints": "ppo.callbacks",
        "EarlyStopping": "ppo.callbacks",
        "MetricsLog": "ppo.callbacks",
        "PretrainStream": "ppo.ptx",
        "PPOTrainer": "ppo.trainer",
        "run_eval": "recipes.evaluate",
        "generate_file": "recipes.generate",
        "run_iterate": "recipes.iterate",
        "reward_function": "recipes.ppo",
        "run_ppo": "recipes.ppo",
        "run_rm": "recipes.reward_model",
        "run_sft": "recipes.sft",
        "response_texts": "rewards.functions",
        "text_reward": "rewards.functions",
        "Generator": "rollout.generator",
        "Rollout": "rollout.rollout",
    },
)
