"""Decoding on a GPU: a step as one CUDA graph instead of hundreds of kernel launches, and compiled layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, cuda, nn
from transformers.cache_utils import Cache

from rlhf_engine.model import LanguageModel
from rlhf_engine.model.trunk import layers_of

WARM_UP = 2
"""Runs before a capture: in the first one libraries allocate their workspaces and Triton compiles."""


class GraphedStep:
    """`step(key, size)` runs `function(size)`, which is captured once per size and replayed from then on.

    `function` reads and writes tensors at fixed addresses and does not wait for the device. All graphs are dropped when the key
    changes, which consists of those addresses. Warm-up runs happen within `idle()`, which must undo their effects.
    Raises ValueError without a CUDA device.
    """

    def __init__(self, function: Callable[[int], None]) -> None:
        if not cuda.is_available():
            raise ValueError("graphs: no CUDA device is available; run the step without capturing it")
        self.function = function
        self.key: object = None
        self._captured: dict[int, cuda.CUDAGraph] = {}

    def __call__(self, key: object, size: int, idle: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        if key != self.key:
            self._captured.clear()
            self.key = key
        if size not in self._captured:
            with idle():
                self._captured[size] = self._capture(size)
        self._captured[size].replay()

    def _capture(self, size: int) -> cuda.CUDAGraph:
        stream = cuda.Stream()
        stream.wait_stream(cuda.current_stream())
        with cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(size)
        cuda.current_stream().wait_stream(stream)
        graph = cuda.CUDAGraph()
        # Graphs never run at the same time, so that all of them share one pool of memory.
        pool = next(iter(self._captured.values())).pool() if self._captured else None
        with cuda.graph(graph, pool=pool):
            self.function(size)
        return graph


def ladder(count: int, least: int = 1) -> int:
    """Return the rows to which a step of `count` sequences is padded: a power of two, so that few graphs serve all counts."""
    return max(least, 1 << (count - 1).bit_length())


# ---- compiled layers ----
# A layer of transformers launches dozens of small kernels: with 28 layers a decode step launches 1,200, compiled 390.
# All layers of one class share one compiled function. They differ only in their weights and in their keys and values, which are
# read from a cache object per layer, so that no layer index is compiled in.


LIMIT = 512
"""Compiled variants per class of layer in a process: numbers of rows, attention with and without a window, weight shapes."""


class _LayerCache:
    """The part of a cache that belongs to one layer."""

    def __init__(self, layer: Any) -> None:  # an element of `Cache.layers`
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        return self.layer.update(keys, values)


def why_not(policy: LanguageModel, cache: Cache) -> str:
    """Return why the layers cannot be compiled; an empty string if they can."""
    layers = list(layers_of(policy.trunk))
    if len(layers) != len(cache.layers):
        return f"with {len(layers)} layers that transformers marks, expected {len(cache.layers)}, those of its config"
    if any("forward" in vars(layer) for layer in layers):
        return "with layers whose forward was replaced, expected that of their class"
    return ""


class CompiledLayers:
    """`with compiled():` the policy's layers run compiled; afterwards they are unchanged.

    Nothing here compares compiled layers with the originals: the metric `logprob_deviation` shows a difference, per rollout.
    Raises ValueError where `why_not` gives a reason. `backend` is torch.compile's.
    """

    def __init__(self, policy: LanguageModel, cache: Cache, backend: str | Callable[..., Any] = "inductor") -> None:
        why = why_not(policy, cache)
        if why:
            raise ValueError(
                f"rollout.compile: got {type(policy.model).__name__} {why}; rollout.compile=false decodes without compiling"
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
        """Run the layers compiled within."""
        limits = {"recompile_limit": LIMIT, "fail_on_recompile_limit_hit": True}
        for layer, forward in zip(self.layers, self.forwards, strict=True):
            layer.forward = forward
        try:
            # With this option a layer index that the layer's code reads is an input of the compiled function.
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, **limits):
                yield
        finally:
            for layer in self.layers:
                del layer.forward


def _forward(compiled: Callable[..., Any], layer: nn.Module, cache: Cache, own: _LayerCache) -> Callable[..., Any]:
    """Return a `layer.forward` that calls the function compiled for its class, with the layer's own part of the cache."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [own if argument is cache else argument for argument in args]
        return compiled(layer, *given, **{k: own if argument is cache else argument for k, argument in kwargs.items()})

    return forward
