"""Time of calls on a CPU or a GPU, in rounds that alternate the calls, with the machine's limits measured in each round.

A sample is the time of one call in one round: the fastest of the repeats that fill the round's share of time, because what
interrupts a call on a shared machine only makes it slower. Rounds are spread over the whole measurement, so their spread
shows what changes more slowly. Omitted on purpose: changes of clocks, and pinning.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import ClassVar

import torch

Call = Callable[[], object]
L2_BYTES = 256 * 2**20
"""More than the size of any GPU's L2 cache."""
SHORTEST = 1e-3
"""Seconds: calls of a CPU that are shorter are timed several at a time, because the clock's calls take time too."""


class Timer:
    """Timer of calls on a device, in seconds.

    On a GPU a matrix product is launched before each measurement, so that the launches of the call are queued while it runs,
    as they are in a training step. `on_host` measures the host's time for launches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._front: Call | None = None

    def many(self, call: Call, count: int) -> float:
        """Return the seconds of `count` calls in sequence."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(count):
                call()
            return time.perf_counter() - start
        if self._front is None:
            self._front = in_front(self.device)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._front()
        start_event.record()
        for _ in range(count):
            call()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3

    def fastest(self, call: Call, seconds: float, batch: int) -> float:
        """Return the seconds of a call in the fastest of the batches of `batch` calls that fill `seconds`, at least one."""
        spent = best = self.many(call, batch)
        while spent < seconds:
            took = self.many(call, batch)
            best, spent = min(best, took), spent + took
        return best / batch

    def batch_of(self, call: Call, seconds: float = SHORTEST) -> int:
        """Return how many calls are timed together to fill `seconds`; two calls before compile, allocate and fill caches."""
        call()
        took = self.many(call, 1)
        return 1 if self.device.type == "cuda" else max(1, min(10_000, int(seconds / max(took, 1e-7))))

    def alternate(self, calls: Mapping[str, Call], *, rounds: int, seconds: float = 0.05) -> dict[str, list[float]]:
        """Return one sample per round of each call: the mean of the calls that fill `seconds`, at least one."""
        counts = {name: self.batch_of(call, seconds) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                samples[name].append(self.many(call, counts[name]) / counts[name])
        return samples

    def on_host(self, call: Call, *, rounds: int = 9, warmup: int = 2) -> float:
        """Return the host's median time to launch a call on an idle device."""
        seconds = []
        for _ in range(warmup + rounds):
            self.synchronize()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        self.synchronize()
        return statistics.median(seconds[warmup:])

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def in_front(device: torch.device) -> Call:
    """Return a matrix product that takes about 5 ms on an H200."""
    factor = torch.randn(12288, 12288, device=device).bfloat16()
    out = torch.empty_like(factor)
    return lambda: torch.mm(factor, factor, out=out)


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
        result = call()
    return graph, result


def copies_to_fill_l2(bytes_per_call: int) -> int:
    """Return how many calls move `L2_BYTES` in total."""
    return max(1, -(-L2_BYTES // max(bytes_per_call, 1)))


class LimitCalls:
    """The calls whose times are the limits: a copy of one block, and a product of random factors.

    With zeros as factors a GPU draws less power and clocks higher. On a CPU the factors are float32, because a CPU without
    instructions for half precision is slower with it. The copy is larger than caches.
    """

    SIZES: ClassVar = {"cpu": (2**26, 1024), "cuda": (2**30, 8192)}
    """Device -> bytes of the block, rows and columns of the factors."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        gpu = device.type == "cuda"
        self.bytes, self.n = self.SIZES[device.type]
        self.source = torch.ones(self.bytes, dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)
        kind = dtype if gpu else torch.float32
        self.a, self.b = (torch.randn(self.n, self.n, device=device).to(kind) for _ in range(2))
        self.out = torch.empty_like(self.a)

    def copy(self) -> None:
        """Copy the block."""
        self.target.copy_(self.source)

    def product(self) -> None:
        """Multiply the factors."""
        torch.mm(self.a, self.b, out=self.out)

    def measure(self, timer: Timer) -> dict[str, float]:
        """Return the seconds of both calls; each is the faster of two."""
        calls = {"copy": self.copy, "product": self.product}
        return {name: min(timer.many(call, 1) for _ in range(2)) for name, call in calls.items()}


def rounds_of(
    calls: Mapping[str, Call],
    timer: Timer,
    limits: LimitCalls,
    found: Mapping[str, list[float]],
    *,
    rounds: int,
    seconds: float,
    few: Collection[str] = (),
    few_rounds: int = 3,
) -> Iterator[dict[str, list[float]]]:
    """Yield the samples of every call after each round; the calls in `few` have only `few_rounds`.

    The limits are measured before each sample and appended to `found`: their floors are the limits, and their spread shows
    how busy the machine was during the measurement.
    """
    limits.measure(timer)  # the first calls allocate
    batches = {name: timer.batch_of(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if name in few and number >= few_rounds:
                continue
            for limit, took in limits.measure(timer).items():
                found[limit].append(took)
            samples[name].append(timer.fastest(call, seconds, batches[name]))
        yield samples
