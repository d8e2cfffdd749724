"""Device time by CUDA events. In a dry run a call is made once and no time comes out of it.

What is left out on purpose: no change of clocks and no pinning; a ratio is trusted because both sides ran in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
L2_BYTES = 256 * 2**20
"""More than any L2 holds."""


class Timer:
    """Medians in seconds; None in a dry run."""

    def __init__(self, *, dry_run: bool):
        self.dry_run = dry_run

    def alternate(self, cases: dict[str, Call], *, rounds: int = 9, warmup: int = 2) -> dict[str, float | None]:
        """Each case in turn, `rounds` times: device time. A product runs in front of each, behind which its launches queue up
        as behind the rest of a training step; what the host takes for them is `on_host`'s to say.
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
        """About 5 ms of work on an H200."""
        factor = torch.randn(12288, 12288, device="cuda").bfloat16()
        out = torch.empty_like(factor)
        return lambda: torch.mm(factor, factor, out=out)

    def once(self, call: Call, **options: int) -> float | None:
        return self.alternate({"": call}, **options)[""]

    def on_host(self, call: Call, *, rounds: int = 9, warmup: int = 2) -> float | None:
        """What the host takes to launch a call, the device idle before."""
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
        """Of one call, without launch overhead: all of them in a CUDA graph, replayed.

        Give as many calls on tensors of their own as it takes to fill the L2, so that each finds its own evicted.
        """
        if self.dry_run:
            for call in calls:
                call()
            return None
        graph, _ = capture(lambda: [call() for call in calls])
        return self.once(graph.replay, rounds=replays) / len(calls)


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, object]:
    """The call as a graph, and what it returned: tensors that a replay fills again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates, which a capture must not
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = call()
    return graph, made


def copies_to_fill_l2(bytes_a_call: int, *, dry_run: bool) -> int:
    """How many calls move as much as the L2 holds."""
    return 2 if dry_run else max(1, -(-L2_BYTES // max(bytes_a_call, 1)))
