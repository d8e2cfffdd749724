"""The three stages of InstructGPT as functions from a config and files to a folder that the next stage can start from."""

from rlhf_engine.stages.loading import (
    computing,
    load_model,
    load_reward_model,
    make_generator,
    save_model,
    stage_metrics,
)
from rlhf_engine.stages.ppo import reward_function, rollout_examples, run_ppo
from rlhf_engine.stages.supervised import run_rm, run_sft

__all__ = [
    "computing",
    "load_model",
    "load_reward_model",
    "make_generator",
    "reward_function",
    "rollout_examples",
    "run_ppo",
    "run_rm",
    "run_sft",
    "save_model",
    "stage_metrics",
]
