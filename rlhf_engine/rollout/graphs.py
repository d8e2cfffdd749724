"""A decode step as a CUDA graph: hundreds of small kernels launched as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

WARM_UP = 2
"""Runs before a capture: libraries make their workspaces in the first, and Triton compiles."""


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class GraphedStep:
    """`step(key, *inputs)` is `function(*inputs)`, captured once for each shape of the inputs and replayed from then on.

    `function` takes and returns tensors and waits for nothing. Whatever else it reads lies where `key` says: a key that changed
    (the addresses of the weights and of the pages) drops every graph. What is returned is overwritten by the next call.
    `cuda` is torch.cuda; a test brings a stand-in. Raises ValueError where there is no device.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], cuda: ModuleType = torch.cuda) -> None:
        if not cuda.is_available():
            raise ValueError(
                "graphs: got a machine without a CUDA device, expected one: elsewhere a step runs as it is"
            )
        self.function, self.cuda = function, cuda
        self.key: object = None
        self._captured: dict[tuple[torch.Size, ...], _Captured] = {}

    def __call__(self, key: object, *inputs: Tensor) -> tuple[Tensor, ...]:
        if key != self.key:
            self._captured.clear()
            self.key = key
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._captured:
            self._captured[shapes] = self._capture(inputs)
        step = self._captured[shapes]
        for static, x in zip(step.inputs, inputs, strict=True):
            static.copy_(x)
        step.graph.replay()
        return step.outputs

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Captured:
        static = tuple(x.clone() for x in inputs)
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(*static)
        self.cuda.current_stream().wait_stream(stream)
        graph = self.cuda.CUDAGraph()
        # They never run at the same time, so that all of them share one pool of memory.
        pool = next(iter(self._captured.values())).graph.pool() if self._captured else None
        with self.cuda.graph(graph, pool=pool):
            outputs = self.function(*static)
        return _Captured(graph, static, outputs)


def ladder(count: int, least: int = 1) -> int:
    """The number of rows that a step of `count` sequences is padded to: a power of two, so that few graphs serve all."""
    return max(least, 1 << (count - 1).bit_length())
