"""How much of an arena each phase of an update takes, by the shapes that it works on."""

from __future__ import annotations

import torch

from rlhf_engine.memory import gradient_bytes
from rlhf_engine.memory.arena import room_for
from rlhf_engine.model import ActorCritic
from rlhf_engine.optim.offload import StagedAdamW
from rlhf_engine.rollout import Generator
from rlhf_kernels import head_workspace_bytes


def head_bytes(policy: ActorCritic) -> int:
    """Bytes of the fused head's logits, on the CPU, where they do not come from an allocator that keeps blocks."""
    if policy.device.type != "cpu":
        return 0
    backend = "triton" if policy.backend == "triton" else "cpu"
    return head_workspace_bytes(policy.lm_weight.shape[0], policy.product_dtype, backend=backend)


def phase_bytes(policy: ActorCritic, generator: Generator, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that each phase takes by name: keys and values; logits; gradients, and either logits or state in transit.

    The gradients of a step are whole before its state comes, unless the state is copied while they are made.
    """
    head = room_for((head_bytes(policy),), torch.uint8)
    gradients = gradient_bytes(p for group in optimizer.param_groups for p in group["params"])
    transit = optimizer.transit_bytes if isinstance(optimizer, StagedAdamW) else 0
    return {"generate": generator.cache_bytes, "score": head, "train": gradients + max(head, transit)}
