"""A decode step as a CUDA graph: hundreds of small kernels launched as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_engine.model import ActorCritic
from rlhf_engine.model.trunk import layers_of

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


# ---- compiled layers ----
# The layers of a trunk are compiled for the decode step, once for all of them.
# A layer of transformers launches dozens of small kernels: with 28 layers a decode step launches 1,200, compiled 390.
# One graph serves every layer. Layers differ in their weights and in their keys and values only; those come from a cache object
# per layer, so that no layer index is compiled in.


LIMIT = 512
"""Graphs of one kind of layer in a process: numbers of rows, attention with and without a window, shapes of weights."""


class _LayerCache:
    """What one layer sees of a cache."""

    def __init__(self, layer: CacheLayerMixin) -> None:
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        return self.layer.update(keys, values)


def why_not(policy: ActorCritic, cache: Cache) -> str:
    """Why the layers cannot be compiled; empty when they can."""
    layers = list(layers_of(policy.trunk))
    if len(layers) != len(cache.layers):
        return f"with {len(layers)} layers that transformers marks, expected {len(cache.layers)}, those of its config"
    if any("forward" in vars(layer) for layer in layers):
        return "with layers whose forward was replaced, expected their own"
    return ""


class CompiledLayers:
    """`with compiled():` the policy's layers run compiled, and are as they were behind it.

    What a compiled layer computes is not compared with the layer: `PPOConfig`'s `logprob_deviation` does it, on every rollout.
    Raises ValueError where `why_not` says so. `backend` is torch.compile's.
    """

    def __init__(self, policy: ActorCritic, cache: Cache, backend: str | Callable[..., Any] = "inductor") -> None:
        why = why_not(policy, cache)
        if why:
            raise ValueError(
                f"rollout.compile: got {type(policy.model).__name__} {why}; rollout.compile=false decodes as it is"
            )
        self.layers = list(layers_of(policy.trunk))
        compile_ = torch.compile(dynamic=False, backend=backend)
        kinds = {type(layer): compile_(type(layer).forward) for layer in self.layers}
        self.forwards = [
            _forward(kinds[type(layer)], layer, cache, _LayerCache(own))
            for layer, own in zip(self.layers, cache.layers, strict=True)
        ]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        limits = {"recompile_limit": LIMIT, "fail_on_recompile_limit_hit": True}
        for layer, forward in zip(self.layers, self.forwards, strict=True):
            layer.forward = forward
        try:
            # A layer's number, where its code reads one, is an input then.
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, **limits):
                yield
        finally:
            for layer in self.layers:
                del layer.forward


def _forward(compiled: Callable[..., Any], layer: nn.Module, cache: Cache, own: _LayerCache) -> Callable[..., Any]:
    """`layer.forward` by the function that is compiled for its kind, on the layer's own part of the cache."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        args = [own if argument is cache else argument for argument in args]
        return compiled(layer, *args, **{k: own if argument is cache else argument for k, argument in kwargs.items()})

    return forward
