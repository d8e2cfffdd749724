"""Medians of device times. In a dry run, a call runs once and has no time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from rlhf_engine.bench import timing
from rlhf_engine.bench.timing import Call, capture

__all__ = ["Call", "Timer", "capture", "copies_to_fill_l2"]


class Timer:
    """Timer of calls; its methods return medians in seconds, or None in a dry run."""

    def __init__(self, *, dry_run: bool):
        self.dry_run = dry_run
        self.timer = timing.Timer(torch.device("cpu" if dry_run else "cuda"))

    def alternate(self, cases: dict[str, Call], *, rounds: int = 9, warmup: int = 2) -> dict[str, float | None]:
        """Return the device time of each case, measured in alternation for `rounds` rounds, after `warmup` rounds."""
        if self.dry_run:
            for call in cases.values():
                call()
            return dict.fromkeys(cases)
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for index in range(warmup + rounds):
            for name, call in cases.items():
                took = self.timer.many(call, 1)
                if index >= warmup:
                    seconds[name].append(took)
        return {name: statistics.median(found) for name, found in seconds.items()}

    def once(self, call: Call, **options: int) -> float | None:
        return self.alternate({"": call}, **options)[""]

    def on_host(self, call: Call) -> float | None:
        """Return the host's time to launch a call on an idle device."""
        if self.dry_run:
            call()
            return None
        return self.timer.on_host(call)

    def replayed(self, calls: Sequence[Call], *, replays: int = 20) -> float | None:
        """Return the time of one call without launch overhead: all calls are captured in a CUDA graph, which is replayed.

        Pass as many calls on different tensors as are needed to fill the L2 cache, so that the tensors of a call are evicted
        before it runs again.
        """
        if self.dry_run:
            for call in calls:
                call()
            return None
        graph, _ = capture(lambda: [call() for call in calls])
        return self.once(graph.replay, rounds=replays) / len(calls)


def copies_to_fill_l2(bytes_a_call: int, *, dry_run: bool) -> int:
    """Return how many calls move `timing.L2_BYTES` in total."""
    return 2 if dry_run else timing.copies_to_fill_l2(bytes_a_call)
