"""Run-time memory: the arena that the phases of an update share, gradients in the arena, and measured peaks."""

from rlhf_engine.memory.arena import Arena, PeakMeter, gradient_bytes, gradients_in
from rlhf_engine.memory.pool import AnyArena, PoolArena, open_arena

__all__ = ["AnyArena", "Arena", "PeakMeter", "PoolArena", "gradient_bytes", "gradients_in", "open_arena"]
