"""Decoding on a GPU: one CUDA graph per step instead of hundreds of kernel launches, and compiled layers."""

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
"""Runs before a capture. In the first run, libraries allocate their workspaces and Triton compiles its kernels."""


class GraphedStep:
    """Runs `function(size)` as a CUDA graph that is captured once per size and then replayed.

    `function` reads and writes tensors at fixed addresses and must not wait for the device. `step(key, size, idle)` drops all
    graphs when `key` changes, so the key must contain those addresses. Warm-up runs are inside `idle()`, which must undo their
    effects.

    Raises:
        ValueError: without a CUDA device.
    """

    def __init__(self, function: Callable[[int], None]) -> None:
        if not cuda.is_available():
            raise ValueError("CUDA graphs need a CUDA device, and none is available; run the step without capturing it")
        self.function = function
        self.key: object = None
        self._captured: dict[int, cuda.CUDAGraph] = {}

    def __call__(self, key: object, size: int, idle: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Replay the graph of `size`, and capture it first if there is none for this key."""
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
        # Graphs never run at the same time, so all of them share one memory pool.
        pool = next(iter(self._captured.values())).pool() if self._captured else None
        with cuda.graph(graph, pool=pool):
            self.function(size)
        return graph


def ladder(count: int, least: int = 1) -> int:
    """Return the padded number of rows of a step of `count` sequences: a power of two, which bounds the number of graphs."""
    return max(least, 1 << (count - 1).bit_length())


# ---- compiled layers ----
# A transformers layer launches dozens of small kernels: a decode step with 28 layers launches 1,200, and 390 when compiled.
# All layers of one class share one compiled function. They differ only in their weights and in their keys and values. The keys
# and values are read from one cache object per layer, so that no layer index is compiled in.


LIMIT = 512
"""Maximum number of compiled variants per layer class: number of rows, attention with or without a window, weight shapes."""


class _LayerCache:
    """The cache of one layer, with the interface of a cache of all layers."""

    def __init__(self, layer: Any) -> None:  # an element of `Cache.layers`
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        return self.layer.update(keys, values)


def why_not(policy: LanguageModel, cache: Cache) -> str:
    """Return the reason why the layers cannot be compiled, or an empty string if they can."""
    layers = list(layers_of(policy.trunk))
    if len(layers) != len(cache.layers):
        return f"with {len(layers)} layers that transformers marks, expected {len(cache.layers)} by its config"
    if any("forward" in vars(layer) for layer in layers):
        return "with layers whose forward was replaced, expected the forward of their class"
    return ""


class CompiledLayers:
    """Runs the policy's layers compiled inside `with compiled():` and restores them at its end.

    This class does not compare compiled layers with the originals. The metric `logprob_deviation` of each rollout shows a
    difference. `backend` is that of torch.compile.

    Raises:
        ValueError: if `why_not` returns a reason.
    """

    def __init__(self, policy: LanguageModel, cache: Cache, backend: str | Callable[..., Any] = "inductor") -> None:
        why = why_not(policy, cache)
        if why:
            raise ValueError(
                f"rollout.compile: got {type(policy.model).__name__} {why}; set rollout.compile=false to decode uncompiled"
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
        """Run the layers compiled inside the `with` block."""
        limits = {"recompile_limit": LIMIT, "fail_on_recompile_limit_hit": True}
        for layer, forward in zip(self.layers, self.forwards, strict=True):
            layer.forward = forward
        try:
            # This option turns a layer index that the layer's code reads into an input of the compiled function.
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True, **limits):
                yield
        finally:
            for layer in self.layers:
                del layer.forward


def _forward(compiled: Callable[..., Any], layer: nn.Module, cache: Cache, own: _LayerCache) -> Callable[..., Any]:
    """Return a `layer.forward` that calls the compiled function of its class with the cache of this layer."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [own if argument is cache else argument for argument in args]
        return compiled(layer, *given, **{k: own if argument is cache else argument for k, argument in kwargs.items()})

    return forward
