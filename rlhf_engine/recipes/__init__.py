"""The three stages of InstructGPT as functions from a config and files to a folder that the next stage can start from."""

from rlhf_engine.recipes.loading import (
    computing,
    load_model,
    load_reward_model,
    save_result,
    stage_metrics,
)
from rlhf_engine.recipes.ppo import reward_function, rollout_examples, run_ppo
from rlhf_engine.recipes.reward_model import run_rm
from rlhf_engine.recipes.sft import run_sft

__all__ = [
    "computing",
    "load_model",
    "load_reward_model",
    "reward_function",
    "rollout_examples",
    "run_ppo",
    "run_rm",
    "run_sft",
    "save_result",
    "stage_metrics",
]
