"""One entry of the suite's results, as the worker processes send it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

COPY, MATMUL = "copy bandwidth", "bf16 matrix rate"
"""Names of the ceilings, in TB/s and TFLOP/s."""
HEAD_PEERS = (4096, 4096, 128256)
"""Tokens, hidden size and vocabulary of the comparison of `linear_ppo_loss` with its peers."""
DRY_RUN = "DRY RUN on a CPU, through Triton's interpreter, at tiny shapes: no GPU was used and nothing was measured."


@dataclass(frozen=True)
class Entry:
    """A fact, a check that passed or failed, or a figure with or without a bound."""

    name: str
    value: float | str | None = None
    """None if there is no figure: it ran without measurement (a dry run), or it failed."""
    unit: str = ""
    bound: float | None = None
    at_least: bool = False
    """True: the bound is a minimum; False: it is a maximum."""
    passed: bool | None = None
    """Result of a check without a value."""
    note: str = ""
    error: str = ""
    """Why there is no value."""
    skipped: str = ""
    """Why it did not run."""

    @property
    def met(self) -> bool | None:
        """Whether the bound is met or the check passed; None without a bound or a figure to compare with it."""
        if self.error:
            return False
        if self.bound is None or not isinstance(self.value, (int, float)):
            return self.passed
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def record(self) -> dict:
        return {key: value for key, value in asdict(self).items() if value not in (None, "", False)} | {
            "name": self.name,
            "value": self.value,
            "met": self.met,
        }
