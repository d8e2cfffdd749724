"""A decode step as a CUDA graph: hundreds of small kernels launched as one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

WARM_UP = 2
"""Runs before a capture: libraries make their workspaces in the first, and Triton compiles."""


class GraphedStep:
    """`step(key, size)` is `function(size)`, captured once for each size and replayed from then on.

    `function` reads and writes tensors at fixed addresses and waits for nothing. A key that changed (those addresses, of the
    weights, the pages and the rest) drops every graph. In `idle`, where it is run to warm up, nothing it does may count.
    `cuda` is torch.cuda; a test brings a stand-in. Raises ValueError where there is no device.
    """

    def __init__(self, function: Callable[[int], None], cuda: ModuleType = torch.cuda) -> None:
        if not cuda.is_available():
            raise ValueError(
                "graphs: got a machine without a CUDA device, expected one: elsewhere a step runs as it is"
            )
        self.function, self.cuda = function, cuda
        self.key: object = None
        self._captured: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, key: object, size: int, idle: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        if key != self.key:
            self._captured.clear()
            self.key = key
        if size not in self._captured:
            with idle():
                self._captured[size] = self._capture(size)
        self._captured[size].replay()

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(size)
        self.cuda.current_stream().wait_stream(stream)
        graph = self.cuda.CUDAGraph()
        # They never run at the same time, so that all of them share one pool of memory.
        pool = next(iter(self._captured.values())).pool() if self._captured else None
        with self.cuda.graph(graph, pool=pool):
            self.function(size)
        return graph


def ladder(count: int, least: int = 1) -> int:
    """The number of rows that a step of `count` sequences is padded to: a power of two, so that few graphs serve all."""
    return max(least, 1 << (count - 1).bit_length())
