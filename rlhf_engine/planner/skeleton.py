"""Memory of a model with recurrent states, counted in passes of the model's own code over tensors without data.

The layers of these families differ too much for formulas: a scan of chunks has a dozen temporaries. torch's `meta` device
computes shapes only, so a model of any size is built in seconds and takes no memory. Counted are the bytes of all tensors that
exist at the same time. One sequence of at most `MOST_COLUMNS` tokens is counted and scaled to the tokens of a pass.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from rlhf_engine.model.trunk import checkpoint_layers, last_hidden, trunk_of
from rlhf_engine.rollout.decode.recurrent import cache_argument
from rlhf_engine.rollout.decode.states import CacheShape, check_cache, new_cache

MOST_COLUMNS = 512
"""Tokens of a counted pass. With eager attention, whose scores grow with the square of the length, all tokens are counted."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations create inside the context: `live` now, and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: Any = WeakIdKeyDictionary()

    def ignore(self, tensor: Tensor) -> None:
        """Leave the memory of `tensor` out of the count."""
        self.seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the memory of its results."""
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return results

    def _count(self, storage: Any) -> None:
        if storage not in self.seen:
            self.seen[storage] = True
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class PassBytes:
    """Bytes of one pass over one sequence: in a forward pass without gradients, saved for the backward pass, and in it."""

    forward: int
    saved: int
    backward: int


class Skeleton:
    """A causal LM on the `meta` device, whose tensors have shapes and no data."""

    cache: CacheShape
    """Shapes of the tensors that one sequence has in the model's cache."""

    def __init__(
        self, config: PreTrainedConfig, dtype: torch.dtype, *, eager: bool, checkpointed: bool = False
    ) -> None:
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager" if eager else None
            ).eval()
        if self.model._can_set_experts_implementation():
            # The only implementation without sizes that depend on the data. It copies the weights of each token's experts.
            self.model.set_experts_implementation("batched_mm")
        self.trunk, self.eager = trunk_of(self.model), eager
        self.cache = self._cache()
        for parameter in self.model.parameters():  # an update sums a gradient elsewhere and frees it
            parameter.register_post_accumulate_grad_hook(_free_gradient)
        if checkpointed:
            checkpoint_layers(self.trunk)

    @torch.no_grad()
    def _cache(self) -> CacheShape:
        """Return the shapes in the model's cache, as sampling finds them."""
        cache = new_cache(self.model)
        with cache_argument(self.trunk):
            self.trunk(input_ids=_ids(1), past_key_values=cache, use_cache=True)
        check_cache(self.model, cache)
        return CacheShape.of(cache)

    def count(self, columns: int) -> PassBytes:
        """Return the bytes of passes over one sequence of `columns` tokens, without those of weights and their gradients."""
        # Without a mask, transformers reads the data of positions to find packed sequences.
        dtype = self.model.dtype if self.eager else torch.bool
        mask = torch.empty(1, 1, columns, columns, dtype=dtype, device="meta") if self.cache.keys else None
        run = partial(last_hidden, self.trunk, _ids(columns), compute_dtype=None, use_cache=False, attention_mask=mask)
        with torch.no_grad(), self._counter() as forward:
            run()
        with self._counter() as counter:
            hidden = run()
            saved, counter.peak = counter.live, counter.live
            hidden.backward(torch.empty_like(hidden))
        return PassBytes(forward.peak, saved, counter.peak - saved)

    def _counter(self) -> LiveBytes:
        counter = LiveBytes()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            counter.ignore(tensor)
        return counter


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _ids(columns: int) -> Tensor:
    return torch.zeros(1, columns, dtype=torch.int64, device="meta")
