"""Where the bytes of a run live."""

from rlhf_engine.memory.plan import MemoryPlan, Phase
from rlhf_engine.memory.shape import ModelShape, UnknownMemoryError
from rlhf_engine.memory.workload import Workload

__all__ = ["MemoryPlan", "ModelShape", "Phase", "UnknownMemoryError", "Workload"]
