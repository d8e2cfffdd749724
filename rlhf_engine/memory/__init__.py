"""Where the bytes of a run live."""

from rlhf_engine.memory.arena import Arena
from rlhf_engine.memory.gradients import gradient_bytes, gradients_in
from rlhf_engine.memory.opening import AnyArena, open_arena
from rlhf_engine.memory.peaks import PeakMeter
from rlhf_engine.memory.plan import MemoryPlan, Phase
from rlhf_engine.memory.pool import PoolArena
from rlhf_engine.memory.shape import ModelShape, UnknownMemoryError
from rlhf_engine.memory.workload import Workload

__all__ = [
    "AnyArena",
    "Arena",
    "MemoryPlan",
    "ModelShape",
    "PeakMeter",
    "Phase",
    "PoolArena",
    "UnknownMemoryError",
    "Workload",
    "gradient_bytes",
    "gradients_in",
    "open_arena",
]
