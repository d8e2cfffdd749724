"""Bytes at run time: the arena that phases share, gradients in it, measured peaks."""

from rlhf_engine.memory.arena import Arena, PeakMeter, gradient_bytes, gradients_in
from rlhf_engine.memory.pool import AnyArena, PoolArena, open_arena

__all__ = ["AnyArena", "Arena", "PeakMeter", "PoolArena", "gradient_bytes", "gradients_in", "open_arena"]
