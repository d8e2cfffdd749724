"""Device time by CUDA events. In a dry run, a call runs once and has no time.

Omitted on purpose: changes of clocks, and pinning. A ratio is reliable because its two cases ran in alternation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
L2_BYTES = 256 * 2**20
"""More than the size of any L2 cache."""


class Timer:
    """Timer of calls; its methods return medians in seconds, or None in a dry run."""

    def __init__(self, *, dry_run: bool):
        self.dry_run = dry_run

    def alternate(self, cases: dict[str, Call], *, rounds: int = 9, warmup: int = 2) -> dict[str, float | None]:
        """Return the device time of each case, measured in alternation for `rounds` rounds.

        Before each call, a matrix product is launched, so that the launches of the call are queued while it runs, as they
        are in a training step. `on_host` measures the host's time for launches.
        """
        if self.dry_run:
            for call in cases.values():
                call()
            return dict.fromkeys(cases)
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        front = self.in_front()
        for index in range(warmup + rounds):
            for name, call in cases.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                front()
                start.record()
                call()
                end.record()
                end.synchronize()
                if index >= warmup:
                    seconds[name].append(start.elapsed_time(end) / 1e3)
        return {name: statistics.median(found) for name, found in seconds.items()}

    def in_front(self) -> Call:
        """Return a matrix product that takes about 5 ms on an H200."""
        factor = torch.randn(12288, 12288, device="cuda").bfloat16()
        out = torch.empty_like(factor)
        return lambda: torch.mm(factor, factor, out=out)

    def once(self, call: Call, **options: int) -> float | None:
        return self.alternate({"": call}, **options)[""]

    def on_host(self, call: Call, *, rounds: int = 9, warmup: int = 2) -> float | None:
        """Return the host's time to launch a call on an idle device."""
        if self.dry_run:
            call()
            return None
        seconds = []
        for _ in range(warmup + rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return statistics.median(seconds[warmup:])

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


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, object]:
    """Capture a call as a CUDA graph; return the graph and the call's outputs, which a replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates before the capture, which must do neither
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()
    return graph, made


def copies_to_fill_l2(bytes_a_call: int, *, dry_run: bool) -> int:
    """Return how many calls move `L2_BYTES` in total."""
    return 2 if dry_run else max(1, -(-L2_BYTES // max(bytes_a_call, 1)))
