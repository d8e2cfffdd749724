"""The memory plan of a PPO run: bytes of every item in every phase, computed without a device.

    peak = persistent + the largest phase

A phase frees its memory before the next one allocates, so the phases do not add up. Every number is an upper bound: all
sequences count with their maximum length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from rlhf_engine.config import RunConfig
from rlhf_engine.planner import items as phase_items
from rlhf_engine.planner.model_shape import ModelShape
from rlhf_engine.planner.workload import Workload

PHASES = ("generate", "score", "train")


@dataclass(frozen=True)
class Phase:
    """Bytes of one phase in addition to the persistent items: `phase["kv_cache"]` is an item at the largest moment."""

    moments: Mapping[str, Mapping[str, int]]
    """Moment -> item -> bytes."""

    @property
    def moment(self) -> str:
        """Name of the moment with the most bytes."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def items(self) -> Mapping[str, int]:
        """Item -> bytes at that moment."""
        return self.moments[self.moment]

    @property
    def total(self) -> int:
        """Bytes at that moment."""
        return sum(self.items.values())

    def __getitem__(self, item: str) -> int:
        return self.items[item]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a workload: `phases["train"]["gradients"]`, `persistent["policy"]`.

    The budget determines `slots` and `kv_bytes`. Pages are allocated as sequences grow. A pool with fewer pages than
    sequences of maximum length would need therefore keeps all slots, as long as every sequence can begin.
    """

    workload: Workload
    slots: int
    """Sequences that are decoded together: `workload.slots`, or as many as fit the budget; 0 if not even one fits."""
    persistent: Mapping[str, int]
    phases: Mapping[str, Phase]

    @classmethod
    def of(cls, workload: Workload) -> Self:
        """Return the plan with as many slots, and then as many bytes of keys and values, as fit the budget.

        If `workload.merge_adapters` is "auto", adapters are merged for sampling if all products are in float32 and the plan has
        neither fewer slots nor fewer bytes of keys and values with the merged weights, and its peak is not higher or fits.
        """
        if workload.merge_adapters == "auto":
            separate = cls._of(replace(workload, merge_adapters="never"))
            if workload.product_dtype != torch.float32 or workload.quant != "none":
                return separate
            merged = cls._of(replace(workload, merge_adapters="always"))
            same = merged.slots == separate.slots and merged.kv_bytes == separate.kv_bytes
            return merged if same and merged.peak <= max(separate.peak, workload.budget or 0) else separate
        return cls._of(workload)

    @classmethod
    def _of(cls, workload: Workload) -> Self:
        kept = phase_items.persistent(workload)
        room = None if workload.budget is None else workload.budget - sum(kept.values())
        slots = _most(lambda count: _generate(workload, count).total, room, workload.slots)
        phases = (
            _generate(workload, max(slots, 1), room),
            Phase(phase_items.score(workload)),
            Phase(phase_items.train(workload)),
        )
        return cls(workload, slots, kept, dict(zip(PHASES, phases, strict=True)))

    @classmethod
    def of_run(cls, config: RunConfig, policy: ModelShape, reward: ModelShape | None) -> Self:
        """Return the plan of `rlhf ppo` with this config."""
        return cls.of(Workload.of(config, policy, reward))

    @property
    def kept(self) -> int:
        """Bytes that persist."""
        return sum(self.persistent.values())

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that sampling may use."""
        return self.phases["generate"]["kv_cache"]

    @property
    def largest(self) -> str:
        """Name of the largest phase."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> int:
        """Bytes that persist plus those of the largest phase."""
        return self.kept + self.phases[self.largest].total

    @property
    def missing(self) -> int:
        """Bytes by which the budget is too small; 0 if it is large enough or there is none."""
        return 0 if self.workload.budget is None else max(0, self.peak - self.workload.budget)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.missing == 0

    def largest_microbatch(self) -> int:
        """Return the most sequences of maximum length, up to a minibatch, that fit the budget in one pass; 0 if none fits."""
        room = None if self.workload.budget is None else self.workload.budget - self.kept

        def need(rows: int) -> int:
            tokens = None if self.workload.microbatch_tokens is None else rows * (self.workload.length - 1)
            workload = replace(self.workload, microbatch=rows, microbatch_tokens=tokens)
            return max(Phase(phase_items.train(workload)).total, Phase(phase_items.score(workload)).total)

        return _most(need, room, self.workload.minibatch)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain numbers, for plan.json."""
        return {
            "peak_bytes": self.peak,
            "budget_bytes": self.workload.budget,
            "missing_bytes": self.missing,
            "slots": self.slots,
            "largest_phase": self.largest,
            "persistent": dict(self.persistent),
            "phases": {name: dict(phase.items) for name, phase in self.phases.items()},
            "largest_moments": {name: phase.moment for name, phase in self.phases.items()},
        }


def _generate(workload: Workload, slots: int, room: int | None = 0) -> Phase:
    """Return the phase with as many bytes of keys and values as fit into `room`; None: all of them."""
    most, least = phase_items.kv_cache(workload, slots), phase_items.least_kv_cache(workload, slots)
    smallest = Phase(phase_items.generate(workload, slots, least))
    if room is None or most == least:
        return Phase(phase_items.generate(workload, slots, most))
    page = phase_items.page_bytes(workload)
    spare = max(0, room - smallest.total) // page * page
    return Phase(phase_items.generate(workload, slots, min(most, least + spare)))


def _most(need: Any, room: int | None, limit: int) -> int:
    """Return the largest count up to `limit` whose `need`, which grows with the count, is within `room`; 0 if none is."""
    if room is None:
        return limit
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle) <= room else (low, middle - 1)
    return low
