"""Limits on a run's metrics: `ppo.warn_on` logs a warning, `ppo.stop_on` ends the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from rlhf_engine.config import LimitsConfig, PPOConfig
from rlhf_engine.notices import notice

_LOWER = ("entropy",)
_UNITS = {"kl": " nats per sequence", "kl_per_token": " nats per token", "entropy": " nats per token", "grad_norm": ""}
_ADVICE = "begin a new run with a lower ppo.optim.lr or a higher ppo.kl_coef"


class Diverged(FloatingPointError):
    """The end of a run whose metrics exceeded a limit of `ppo.stop_on`."""


class Divergence:
    """Counts, for each limit, the updates in a row that exceeded it.

    The counts are part of a checkpoint, so that a resumed run stops at the same update. A limit that a resumed run changes
    goes on with the count of the old one if the last update exceeds it too, and otherwise starts from 0.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.limits: dict[str, LimitsConfig] = {"warn_on": config.warn_on, "stop_on": config.stop_on}
        self.counts: dict[str, int] = {}
        self.last: dict[str, float] = {}

    def add(self, log: Mapping[str, float], update: int) -> None:
        """Count the metrics of update number `update`, the first being 1, and warn of a limit that counts now."""
        self.last = {name: float(log[name]) for name in _UNITS if name in log}
        for key, name, limit in self._limits():
            self.counts[key] = self.counts.get(key, 0) + 1 if _exceeds(name, self.last[name], limit) else 0
            if key.startswith("warn_on") and self.counts[key] == self.limits["warn_on"].updates:
                notice(f"update {update}: {self._sentence(key, name, limit)}; {_ADVICE}")

    def check(self) -> None:
        """Raise Diverged if a limit of `ppo.stop_on` counts."""
        for key, name, limit in self._limits():
            if key.startswith("stop_on") and self.counts.get(key, 0) >= self.limits["stop_on"].updates:
                wider = f"resume this one with a {'lower' if name in _LOWER else 'higher'} ppo.{key}"
                raise Diverged(f"training diverged: {self._sentence(key, name, limit)}; {_ADVICE}, or {wider}")

    def end(self) -> None:
        """Warn of every limit that the last update exceeded, also if too few updates were left for it to count."""
        for key, name, limit in self._limits():
            if key.startswith("warn_on") and self.counts.get(key, 0):
                notice(f"the run ended beyond a limit: {self._sentence(key, name, limit)}; read its samples; {_ADVICE}")

    def state(self) -> dict[str, Any]:
        """Return the counts under their name in a checkpoint."""
        return {"limits": {"counts": dict(self.counts), "last": dict(self.last)}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; checkpoints of earlier releases have no counts."""
        found = state.get("limits", {"counts": {}, "last": {}})
        self.counts, self.last = dict(found["counts"]), dict(found["last"])
        for key, name, limit in self._limits():
            if not _exceeds(name, self.last[name], limit):  # the limit has changed
                self.counts[key] = 0

    def _limits(self) -> Iterator[tuple[str, str, float]]:
        """Yield key, metric and value of every limit on a metric that the last update has."""
        for section, limits in self.limits.items():
            for item in fields(limits):
                value = getattr(limits, item.name)
                if item.name in self.last and value is not None:
                    yield f"{section}.{item.name}", item.name, value

    def _sentence(self, key: str, name: str, limit: float) -> str:
        relation, count = "below" if name in _LOWER else "above", self.counts[key]
        often = "in the last update" if count == 1 else f"in {count} updates in a row"
        return f"{name} is {self.last[name]:.4g}{_UNITS[name]}, {relation} ppo.{key} {limit:g} {often}"


def _exceeds(name: str, value: float, limit: float) -> bool:
    """Return whether a value is outside its limit; NaN is."""
    return not (value >= limit if name in _LOWER else value <= limit)
