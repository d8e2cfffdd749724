"""The layers of a trunk compiled for the decode step, once for all of them.

transformers' layers are dozens of small kernels each: a decode step of a model of 28 layers has 1,200, compiled 390. One graph
serves every layer. What differs between layers is weights, and keys and values, which a cache of the layer's own hands over, so
that no layer's number is in what is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf_engine.model import ActorCritic
from rlhf_engine.model.trunk import layers_of

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
