"""Faults of a run that are not the disk's: in the reward function, in a judge, and in a backward pass."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tests.engine.faults.disk import Fault, FaultyDisk

REWARD_FAULTS = ("raises", "nan", "infinity", "too_few", "none", "text", "exits")
TIMED_FAULTS = ("hangs",)
"""Faults of a reward function in a run with `reward.timeout`."""
BACKWARD_FAULTS = ("out_of_memory", "kill_in_backward", "sigterm_in_backward")

_RUBBISH = {
    "nan": lambda scores: [*scores[:-1], float("nan")],
    "infinity": lambda scores: [*scores[:-1], float("inf")],
    "too_few": lambda scores: scores[:-1],
    "none": lambda scores: None,
    "text": lambda scores: [*scores[:-1], "good"],
}


class Points:
    """The numbers of calls so far, and the fault that happens at one of them."""

    def __init__(self, fault: Fault | None, disk: FaultyDisk) -> None:
        self.fault, self.disk, self.rewards, self.backwards = fault, disk, 0, 0

    def _due(self, count: int, kinds: tuple[str, ...]) -> str | None:
        fault = self.fault
        if fault is None or fault.kind not in kinds or count != fault.at:
            return None
        self.disk.fired = True
        return fault.kind

    def reward(self, scores: list[float]) -> object:
        """Return what a reward function returns in the place of `scores`, or raise."""
        self.rewards += 1
        kind = self._due(self.rewards, (*REWARD_FAULTS, *TIMED_FAULTS))
        if kind == "raises":
            raise KeyError("a fault of the reward function")
        if kind == "exits":
            raise SystemExit(3)
        if kind == "hangs":
            signal.setitimer(signal.ITIMER_REAL, 0.01)  # let the minutes of `reward.timeout` pass now
            time.sleep(60)
            raise AssertionError("the reward function was not ended at its timeout")
        return scores if kind is None else _RUBBISH[kind](scores)

    def backward(self) -> None:
        """Fail before a backward pass."""
        self.backwards += 1
        match self._due(self.backwards, BACKWARD_FAULTS):
            case "out_of_memory":
                raise torch.OutOfMemoryError("a fault: out of memory")
            case "kill_in_backward":
                self.disk.die("kill")
            case "sigterm_in_backward":
                signal.raise_signal(signal.SIGTERM)


_current: list[Points] = []


def reward(scores: list[float]) -> object:
    """Return `scores` as the reward function of the current run does."""
    return _current[-1].reward(scores) if _current else scores


@contextmanager
def reached(points: Points) -> Iterator[None]:
    """Let the calls within the block reach `points`."""
    real = torch.Tensor.backward

    def backward(*arguments, **options):
        points.backward()
        return real(*arguments, **options)

    torch.Tensor.backward = backward
    _current.append(points)
    try:
        yield
    finally:
        torch.Tensor.backward = real
        _current.remove(points)
