"""The arena of a device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlhf_engine.memory.arena import Arena
from rlhf_engine.memory.pool import PoolArena

AnyArena = Arena | PoolArena


def open_arena(device: torch.device, sizes: Mapping[str, int], head_bytes: int) -> AnyArena:
    """An arena on `device` whose phases, by name, take at most `sizes` bytes; ValueError for a device that has none.

    `head_bytes` of them are the fused head's logits, which the allocator of a GPU provides by itself.
    """
    if device.type == "cpu":
        return Arena(sizes, head_bytes=head_bytes)
    if device.type == "cuda":
        return PoolArena(sizes, device)
    raise ValueError(f"device: got {str(device)!r}, expected cpu or cuda: there is no arena on another one")
