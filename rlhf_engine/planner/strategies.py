"""Settings with which a run would fit: every combination is tried, and those that fit are listed fastest first.

The order is an estimate from counted work (`work.update_time`), not from timings. Every halving of the micro-batch or of the
keys and values costs a little more. Adapters, which quantised weights need, and then top layers come last, because they
change what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from rlhf_engine.config import RunConfig
from rlhf_engine.planner.items import kv_cache
from rlhf_engine.planner.model_shape import RecurrentShape
from rlhf_engine.planner.plan import MemoryPlan
from rlhf_engine.planner.work import update_time
from rlhf_engine.planner.workload import Workload

_SWITCH = 0.02
"""Share of an update's time that each change of a switch adds, by estimate, for overhead that is not counted."""
_HALVING = 0.03
"""Share of an update's time that a halving of the micro-batch or of the keys and values adds, by estimate."""

_SETTINGS = {
    "dtype": "dtype",
    "compute_dtype": "compute_dtype",
    "optimizer_state": "memory.optimizer_state",
    "gradient_checkpointing": "memory.gradient_checkpointing",
    "train_layers": "model.train_layers",
    "adapter": "adapter.rank",
    "reference": "ppo.reference",
    "reference_memory": "memory.reference",
    "quant": "model.quant",
    "microbatch": "ppo.microbatch",
    "microbatch_tokens": "ppo.microbatch_tokens",
    "slots": "rollout.batch_size",
}
_SIZED = ("microbatch", "microbatch_tokens", "slots")
"""Changes of a number, which are as large as needed; all others are switches."""


@dataclass(frozen=True)
class Strategy:
    """A plan with some settings changed, and the estimated cost of the change."""

    plan: MemoryPlan
    changes: dict[str, Any]
    """Fields of the workload with their new values."""
    cost: float
    """Share of an update's time that the change adds, by estimate; negative if it saves time."""

    @property
    def words(self) -> str:
        """The change as settings of a config."""
        named = [f"{_SETTINGS[name]}={str(value).lower()}" for name, value in self.changes.items()]
        return ", ".join(named) or "as it is"

    @property
    def kind(self) -> int:
        """What is trained: 0 as configured, 1 adapters instead, 2 only the top layers instead."""
        return 1 if "adapter" in self.changes else 2 if "train_layers" in self.changes else 0

    def settings(self) -> dict[str, Any]:
        """Return the config of a run with this plan, as a tree of settings."""
        return self._tree(_SETTINGS)

    def _tree(self, names: Iterable[str]) -> dict[str, Any]:
        workload = self.plan.workload
        tree: dict[str, Any] = workload.config.to_dict() | {"device": workload.device}
        for name in names:
            *section, key = _SETTINGS[name].split(".")
            (tree[section[0]] if section else tree)[key] = getattr(workload, name)
        return tree

    @property
    def valid(self) -> bool:
        """Whether a config may have these settings."""
        try:
            RunConfig.from_dict(self._tree({name for name in _SETTINGS if name not in _SIZED}))
        except ValueError:
            return False
        return True


def fitting(workload: Workload) -> list[Strategy]:
    """Return the strategies that fit the workload's budget, fastest first, and those that train less after all others.

    A strategy is left out if a faster one needs only a subset of its switches.
    """
    return _fitting(_tried(workload))


def smallest(workload: Workload) -> Strategy:
    """Return the strategy with the smallest peak, whether it fits or not."""
    return _smallest(_tried(workload))


def fitting_or_smallest(workload: Workload) -> tuple[list[Strategy], Strategy]:
    """Return `fitting` and `smallest`, with every strategy planned once."""
    tried = list(_tried(workload))
    return _fitting(tried), _smallest(tried)


def _fitting(tried: Iterable[Strategy]) -> list[Strategy]:
    fits = [one for one in tried if one.plan.fits and one.plan.slots]
    fits.sort(key=lambda one: (one.kind, one.cost, len(one.changes)))
    kept: list[Strategy] = []
    for one in fits:
        switches = _switches(one)
        if not any(_switches(other) <= switches for other in kept):
            kept.append(one)
    return kept


def _smallest(tried: Iterable[Strategy]) -> Strategy:
    return min(tried, key=lambda one: one.plan.peak)


def _switches(strategy: Strategy) -> set[tuple[str, Any]]:
    return {(name, value) for name, value in strategy.changes.items() if name not in _SIZED}


def _tried(workload: Workload) -> Iterator[Strategy]:
    """Yield every combination of changes, each with the largest micro-batch and the most slots that fit.

    If not even a micro-batch of one sequence or one slot fits, it is planned with one.
    """
    recurrent = any(isinstance(shape, RecurrentShape) for shape in (workload.policy, workload.reward))
    layers, whole = workload.policy.layers, workload.adapter == 0 and workload.train_layers is None
    choices: dict[str, list[Any]] = {
        "dtype": ["float32", "bfloat16"],
        "compute_dtype": ["float32", "bfloat16"],
        "optimizer_state": ["resident", "8bit"] + ["host"] * (workload.device != "cpu"),
        "gradient_checkpointing": [False, True],
        "train_layers": [None, max(1, layers // 4)] if whole and not recurrent else [workload.train_layers],
        "adapter": [0, 16] if workload.adapter == 0 else [workload.adapter],
        "quant": ["none"] if recurrent else ["none", "int8", "nf4"],
        # A copy needs more memory than what is chosen automatically, and is not faster.
        "reference": ["auto"],
        "reference_memory": ["device", "host"] if whole and not recurrent and workload.device != "cpu" else ["device"],
    }
    for name, values in choices.items():
        if (now := getattr(workload, name)) not in values:
            values.append(now)
    for values in product(*choices.values()):
        changes = {name: value for name, value in zip(choices, values, strict=True) if value != getattr(workload, name)}
        if _sensible(workload, changes) and (tried := _sized(workload, changes)).valid:
            yield tried


def _sensible(workload: Workload, changes: dict[str, Any]) -> bool:
    changed = replace(workload, **changes)
    rounds_twice = changes.get("compute_dtype") == "bfloat16" and changed.dtype == "bfloat16"
    trains_less = changed.adapter > 0, changed.train_layers is not None
    streams = changed.reference_memory == "host"
    if (
        rounds_twice
        or (all(trains_less) and changes.keys() & {"adapter", "train_layers"})
        or (streams and any(trains_less))
    ):
        return False
    return changed.adapter > 0 or changed.quant == "none"


def _sized(workload: Workload, changes: dict[str, Any]) -> Strategy:
    changed, switches, halvings = replace(workload, **changes), len(changes), 0.0
    plan = MemoryPlan.of(changed)
    rows = max(1, min(changed.train_rows, plan.largest_microbatch()))
    changes = dict(changes)
    if rows < changed.train_rows:
        tokens = changed.microbatch_tokens is not None
        smaller = {"microbatch_tokens": rows * (changed.length - 1)} if tokens else {"microbatch": rows}
        changes |= smaller
        halvings += math.log2(changed.train_rows / rows)
        plan = MemoryPlan.of(replace(changed, **smaller))
    if 0 < plan.slots < workload.slots:
        changes["slots"] = plan.slots
    if plan.slots:
        halvings += math.log2(kv_cache(changed, plan.slots) / plan.kv_bytes)
    after = replace(plan.workload, slots=max(1, plan.slots))
    overhead = 1 + _SWITCH * switches + _HALVING * halvings
    return Strategy(plan, changes, overhead * update_time(after) / update_time(workload) - 1)
