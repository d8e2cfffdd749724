"""Settings with which a run would fit: every combination is tried, and those that fit are listed fastest first.

The order is an estimate from counted work, not from timings. Half-precision matrix products save time. 8-bit state
costs a little. State in host memory crosses the bus twice per optimizer step. Gradient checkpointing repeats a forward
pass. Every halving of the micro-batch, of the slots or of their keys and values costs a little. Quantised weights are
dequantised in every pass. Adapters, which those need, come last, because they change what is trained.
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
from rlhf_engine.planner.workload import Workload

_HALF_SAVES = {"cuda": -0.40, "cpu": 0.30}
"""Share of an update's time that half-precision products add; positive for processors without instructions for them."""
_COSTS: dict[tuple[str, Any], float] = {
    ("compute_dtype", "bfloat16"): 0.0,
    ("dtype", "bfloat16"): 0.01,  # master weights are rounded once per step
    ("optimizer_state", "8bit"): 0.02,
    ("optimizer_state", "host"): 0.10,
    ("gradient_checkpointing", True): 0.25,
    ("adapter", 16): -0.10,
    ("quant", "int8"): 0.15,
    ("quant", "nf4"): 0.20,
}
"""Share of an update's time that each other change adds, by estimate."""
_HALVING = 0.03
"""Share of an update's time that a halving of the micro-batch, the slots or their keys and values adds, by estimate."""

_SETTINGS = {
    "dtype": "dtype",
    "compute_dtype": "compute_dtype",
    "optimizer_state": "memory.optimizer_state",
    "gradient_checkpointing": "memory.gradient_checkpointing",
    "adapter": "adapter.rank",
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
    def valid(self) -> bool:
        """Whether a config may have these settings."""
        workload = self.plan.workload
        tree: dict[str, Any] = workload.config.to_dict() | {"device": workload.device}
        for name, setting in _SETTINGS.items():
            if name not in _SIZED:
                *section, key = setting.split(".")
                (tree[section[0]] if section else tree)[key] = getattr(workload, name)
        try:
            RunConfig.from_dict(tree)
        except ValueError:
            return False
        return True


def fitting(workload: Workload) -> list[Strategy]:
    """Return the strategies that fit the workload's budget, fastest first, and those with adapters after all others.

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
    fits.sort(key=lambda one: ("adapter" in one.changes, one.cost, len(one.changes)))
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
    choices: dict[str, list[Any]] = {
        "dtype": ["float32", "bfloat16"],
        "compute_dtype": ["float32", "bfloat16"],
        "optimizer_state": ["resident", "8bit"] + ["host"] * (workload.device != "cpu"),
        "gradient_checkpointing": [False, True],
        "adapter": [0, 16] if workload.adapter == 0 else [workload.adapter],
        "quant": ["none", "int8", "nf4"],
    }
    for name, values in choices.items():
        if (now := getattr(workload, name)) not in values:
            values.append(now)
    for values in product(*choices.values()):
        changes = {name: value for name, value in zip(choices, values, strict=True) if value != getattr(workload, name)}
        if not _sensible(workload, changes):
            continue
        cost = sum(_COSTS.get(one, math.inf) for one in changes.items())
        if any(value == "bfloat16" for value in changes.values()):
            cost += _HALF_SAVES[workload.device if workload.device in _HALF_SAVES else "cuda"]
        if math.isfinite(cost):
            tried = _sized(workload, changes, cost)
            if tried.valid:
                yield tried


def _sensible(workload: Workload, changes: dict[str, Any]) -> bool:
    changed = replace(workload, **changes)
    rounds_twice = changes.get("compute_dtype") == "bfloat16" and changed.dtype == "bfloat16"
    recurrent = any(isinstance(shape, RecurrentShape) for shape in (changed.policy, changed.reward))
    quantises = changed.adapter > 0 and not recurrent
    return not rounds_twice and (quantises or changed.quant == "none")


def _sized(workload: Workload, changes: dict[str, Any], cost: float) -> Strategy:
    changed = replace(workload, **changes)
    plan = MemoryPlan.of(changed)
    rows = max(1, min(changed.train_rows, plan.largest_microbatch()))
    changes = dict(changes)
    if rows < changed.train_rows:
        tokens = changed.microbatch_tokens is not None
        smaller = {"microbatch_tokens": rows * (changed.length - 1)} if tokens else {"microbatch": rows}
        changes |= smaller
        cost += _HALVING * math.log2(changed.train_rows / rows)
        plan = MemoryPlan.of(replace(changed, **smaller))
    if 0 < plan.slots < workload.slots:
        changes["slots"] = plan.slots
        cost += _HALVING * math.log2(workload.slots / plan.slots)
    if plan.slots:
        cost += _HALVING * math.log2(kv_cache(changed, plan.slots) / plan.kv_bytes)
    return Strategy(plan, changes, cost)
