"""The memory plan of a PPO run, computed before the run starts."""

from rlhf_engine.planner.model_shape import ModelShape, UnknownMemoryError
from rlhf_engine.planner.plan import MemoryPlan, Phase
from rlhf_engine.planner.workload import Workload

__all__ = ["MemoryPlan", "ModelShape", "Phase", "UnknownMemoryError", "Workload"]
