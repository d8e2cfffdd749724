"""A prediction for a PPO run on several GPUs: bytes per rank, bytes over each link, and seconds of an update.

With full fine-tuning, `shard` ranks share one copy of the policy, of a frozen reference, and of gradients and optimizer state
(FSDP2), and there are `gpus / shard` copies. With adapters or top layers, every rank has all weights. A reward model is whole
on every rank. The work of a rank is counted as for one GPU (`work.phase_times`), with its share of the sequences.

What is assumed:
* Speeds are shares of the data sheets (gpus.py), every response has the maximum length, and no rank waits for a slower one.
* Weights are gathered once for the generate phase, before the first step; layer by layer in scoring and training, while the
  device computes, so that the slower of the two counts.
* Every micro-batch gathers each layer for its forward and for its backward pass, and sums its gradients in float32.
* A group of ranks that crosses nodes moves its bytes at the speed of a node's network, or of the link between GPUs if that is
  lower. Each of its operations takes `gpus.HOP` per rank in addition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

from rlhf_engine.planner import items
from rlhf_engine.planner.gpus import GPUS, HOP, LINKS, TRANSFERS, Gpu
from rlhf_engine.planner.model_shape import OUTSIDE
from rlhf_engine.planner.plan import MemoryPlan, Phase
from rlhf_engine.planner.work import phase_times
from rlhf_engine.planner.workload import Workload

GATHERED = 2
"""Layers that are whole at the same time: one that computes and the next one, which is gathered meanwhile."""


@dataclass(frozen=True)
class Traffic:
    """What one rank receives in a kind of collective operation during one update."""

    phase: str
    what: str
    operation: str
    count: float
    """Bytes."""
    calls: int
    ranks: int
    """Ranks of the group."""
    link: str
    """ "GPU link" or "network"."""
    speed: float
    """Bytes per second that a rank can receive."""

    @property
    def seconds(self) -> float:
        """Time of all calls."""
        return self.count / (TRANSFERS * self.speed) + self.calls * (self.ranks - 1) * HOP


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in nodes of `gpu.per_node`, and the number of ranks that share a copy of what is trained."""

    gpu: Gpu
    gpus: int
    shard: int

    @classmethod
    def of(cls, name: str, gpus: int, w: Workload, shard: int | None = None) -> Self:
        """Return the cluster for a workload; `shard` is by default all GPUs for full fine-tuning, and 1 otherwise.

        Raises:
            ValueError: an unknown GPU, a number of GPUs that `shard` does not divide, shards of adapters or top layers, or
                more GPUs than sequences in a rollout batch.
        """
        if name not in GPUS:
            raise ValueError(f"--gpu: got {name!r}, expected one of {', '.join(GPUS)}")
        if gpus < 1:
            raise ValueError(f"--gpus: got {gpus}, expected at least 1")
        whole = not w.adapter and w.train_layers is None
        shard = (gpus if whole else 1) if shard is None else shard
        if shard < 1 or gpus % shard:
            raise ValueError(f"--shard: got {shard} for {gpus} GPUs, expected a number that divides {gpus}")
        if shard > 1 and not whole:
            raise ValueError(
                "--shard: with adapters or top layers every rank has all weights; leave --shard and distributed.shard out"
            )
        if w.rollout_batch < gpus:
            raise ValueError(
                f"ppo.rollout_batch: got {w.rollout_batch} for {gpus} GPUs, expected at least one sequence per GPU; raise it "
                "or lower --gpus"
            )
        return cls(GPUS[name], gpus, shard)

    @property
    def copies(self) -> int:
        """Number of copies of what is trained."""
        return self.gpus // self.shard

    def speed_of_shards(self) -> tuple[str, float]:
        """Return link and bytes per second within the ranks that share a copy, which are consecutive."""
        return self._speed(self.shard, 1)

    def speed_of_copies(self) -> tuple[str, float]:
        """Return link and bytes per second between the copies; groups of one node use its network at the same time."""
        return self._speed(self.gpus, min(self.shard, self.gpu.per_node))

    def _speed(self, reach: int, groups: int) -> tuple[str, float]:
        inside = LINKS[self.gpu.link]
        if reach <= self.gpu.per_node:
            return "GPU link", inside
        return "network", min(inside, self.gpu.network / groups)


@dataclass(frozen=True)
class RankPlan:
    """The plan of each rank of a run on a cluster."""

    cluster: Cluster
    workload: Workload
    """The whole run."""

    @classmethod
    def of(cls, w: Workload, gpu: str, gpus: int, shard: int | None = None) -> Self:
        """Return the plan for a number of GPUs; see `Cluster.of` for what it refuses."""
        w = replace(w, device="cuda", gpu=gpu, budget=None)
        return cls(Cluster.of(gpu, gpus, w, shard), w)

    @cached_property
    def share(self) -> Workload:
        """The part of a rank with the most sequences."""
        w, n = self.workload, self.cluster.gpus
        batch, mini = math.ceil(w.rollout_batch / n), math.ceil(w.minibatch / n)
        sizes = {"rollout_batch": batch, "minibatch": mini, "microbatch": min(w.microbatch, mini)}
        return replace(w, **sizes, slots=min(w.slots, batch), pretraining=math.ceil(w.pretraining / n))

    @property
    def steps(self) -> int:
        """Optimizer steps of an update."""
        return math.ceil(self.workload.rollout_batch / self.workload.minibatch) * self.workload.config.ppo.ppo_epochs

    @property
    def passes(self) -> int:
        """Micro-batches of a rank in an update, forward and backward."""
        return self.steps * math.ceil(self.share.minibatch / self.share.train_rows)

    # ---- bytes ----

    @cached_property
    def persistent(self) -> Mapping[str, int]:
        """Bytes of a rank that persist, by item."""
        sharded = ["policy", "optimizer_state", "master_weights", "average"]
        if self.workload.reference_memory == "device":
            sharded.append("reference")
        parts = self.cluster.shard
        kept = MemoryPlan.of(self.share).persistent
        return {name: -(-count // parts) if name in sharded else count for name, count in kept.items()}

    @cached_property
    def phases(self) -> Mapping[str, Phase]:
        """Bytes of a rank in each phase, by moment and item; keys and values are all that the slots can need."""
        plan, parts = MemoryPlan.of(self.share), self.cluster.shard
        rollouts = {scored: items.rollout(self.workload, scored=scored) for scored in (False, True)}

        def moment(phase: str, name: str, found: Mapping[str, int]) -> dict[str, int]:
            changed = dict(found)
            if "rollout" in changed:  # every rank has the rollouts of all
                changed["rollout"] = rollouts[phase != "generate"]
            if parts == 1:
                return changed
            if "gradients" in changed:
                changed["gradients"] = -(-changed["gradients"] // parts)
            if phase == "generate":
                changed["gathered_weights"] = self._weights  # in addition to the rank's part
            elif name != "optimizer step":
                changed["gathered_weights"] = self._outside + GATHERED * self._layer
            if phase == "train" and name.startswith("backward"):
                changed["whole_gradients"] = max(self._outside, self._layer)
            return changed

        return {
            phase: Phase({name: moment(phase, name, found) for name, found in one.moments.items()})
            for phase, one in plan.phases.items()
        }

    @property
    def _weights(self) -> int:
        return self.workload.policy.parameters * self.workload.weight_bytes

    @property
    def _layer(self) -> int:
        """Bytes of one layer."""
        shapes = self.workload.policy.trunk()
        inside = sum(math.prod(shape[1:]) for name, shape in shapes.items() if name not in OUTSIDE)
        return inside * self.workload.weight_bytes

    @property
    def _outside(self) -> int:
        """Bytes of embedding, head and last norm, which are gathered together for a whole pass."""
        return self._weights - self.workload.policy.layers * self._layer

    @property
    def smallest_pool(self) -> int:
        """Fewest bytes of keys and values with which the slots of a rank can begin."""
        return items.least_kv_cache(self.share, self.share.slots)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of a rank: as many as fit, between the fewest and the most that the slots can use."""
        most = self.phases["generate"]["kv_cache"]
        rest = self.kept + self.phases["generate"].total - most
        return max(self.smallest_pool, min(most, self.cluster.gpu.memory - rest))

    def phase_items(self) -> dict[str, dict[str, int]]:
        """Return the bytes of each phase at its largest moment, by item, with the keys and values that fit."""
        found = {name: dict(phase.items) for name, phase in self.phases.items()}
        found["generate"]["kv_cache"] = self.kv_bytes
        return found

    @property
    def kept(self) -> int:
        """Bytes that persist."""
        return sum(self.persistent.values())

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of a rank at the peak of each phase."""
        totals = {name: self.kept + phase.total for name, phase in self.phases.items()}
        totals["generate"] += self.kv_bytes - self.phases["generate"]["kv_cache"]
        return totals

    @property
    def peak(self) -> int:
        """Bytes of a rank at the peak of the largest phase."""
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory of a GPU."""
        return self.peak <= self.cluster.gpu.memory

    # ---- links ----

    @cached_property
    def traffic(self) -> Sequence[Traffic]:
        """What a rank receives in one update."""
        w, c, groups = self.share, self.cluster, self.workload.policy.layers + 1
        found: list[Traffic] = []
        if c.shard > 1:
            part = (c.shard - 1) / c.shard
            link = (c.shard, *c.speed_of_shards())
            weights = part * self._weights
            scored = math.ceil(w.rollout_batch / w.train_rows)
            found.append(Traffic("generate", "weights", "all-gather", weights, groups, *link))
            if w.copies_reference and w.reference_memory == "device":
                found.append(Traffic("score", "reference", "all-gather", scored * weights, scored * groups, *link))
            both = 2 * self.passes
            found.append(Traffic("train", "weights", "all-gather", both * weights, both * groups, *link))
            summed = self.passes * part * items.trained(w) * items.FLOAT
            found.append(Traffic("train", "gradients", "reduce-scatter", summed, self.passes * groups, *link))
        if c.copies > 1:
            # FSDP2 sums a shard over the copies after every micro-batch; whole gradients are summed once per step.
            calls = self.passes * groups if c.shard > 1 else self.steps
            each = items.trained(w) * items.FLOAT / c.shard * (self.passes if c.shard > 1 else self.steps)
            between = 2 * each * (c.copies - 1) / c.copies
            found.append(Traffic("train", "gradients", "all-reduce", between, calls, c.copies, *c.speed_of_copies()))
        return found

    # ---- time ----

    @cached_property
    def seconds(self) -> Mapping[str, float]:
        """Estimated seconds of an update by phase; scoring and training while a rank communicates."""
        unit = self.cluster.gpu.seconds_per_weight
        work = {name: unit * time for name, time in phase_times(self.share).items()}
        # A minibatch that the ranks do not divide takes as long as its largest part.
        steps = math.ceil(self.workload.rollout_batch / self.workload.minibatch)
        trained = phase_times(replace(self.share, rollout_batch=steps * self.share.minibatch))
        moved = dict.fromkeys(work, 0.0)
        alone = 0.0
        for one in self.traffic:
            if one.operation == "all-reduce" and self.cluster.shard == 1:
                alone += one.seconds
            else:
                moved[one.phase] += one.seconds
        return {
            "generate": work["generate"] + moved["generate"],
            "score": max(work["score"], moved["score"]),
            "train": max(unit * trained["train"], moved["train"]) + alone,
            "optimizer": unit * trained["optimizer"] / self.cluster.shard,
        }

    @property
    def total(self) -> float:
        """Estimated seconds of an update."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain numbers, for plan.json."""
        return {
            "gpus": self.cluster.gpus,
            "gpu": self.workload.gpu,
            "shard": self.cluster.shard,
            "peak_bytes": self.peak,
            "memory_bytes": self.cluster.gpu.memory,
            "persistent": dict(self.persistent),
            "phases": self.phase_items(),
            "traffic": [asdict(one) | {"seconds": one.seconds} for one in self.traffic],
            "seconds": dict(self.seconds),
        }
