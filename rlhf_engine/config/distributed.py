"""Settings of runs with more than one process."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_engine.config.schema import Count, Positive, Section


@dataclass(frozen=True)
class DistributedConfig(Section):
    """Placement of a run with several ranks, which torchrun or `--gpus` starts. Ignored by a run with one process."""

    shard: Count | None = None
    """Number of ranks that hold one copy of the trained weights together, with gradients and optimizer state (FSDP2).
    Their numbers are consecutive, so that with the number of GPUs per node, weights are gathered inside a node. 1: every
    rank has a whole copy. If None, all ranks share one copy; with adapters or model.train_layers, every rank has a whole
    one."""
    replicate: Count | None = None
    """Number of copies of the weights, so that shard times replicate is the number of ranks. If None, it follows from
    shard."""
    timeout: Positive = 1800.0
    """Seconds after which a run fails if a rank does not arrive at a collective operation, for example because a reward
    hangs. A rank that raises or dies ends the run within a minute in any case."""
