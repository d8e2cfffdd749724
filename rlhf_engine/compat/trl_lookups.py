"""Embeddings that add the gradients of their rows to a sum in the arena.

The gradient of an embedding has a row per id of the vocabulary, of which a batch has few. Autograd allocates, zeroes and adds
the whole matrix in every backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn


@contextmanager
def rows_added(model: nn.Module, places: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Let the embeddings of `model` add their rows to the places of `gradients_in`, inside the context and on a CPU.

    `torch.autograd.grad` then finds no gradient of their weights; `backward` does.
    """
    found: list[nn.Embedding] = []
    try:
        for module in model.modules():
            if _adds_rows(module) and module.weight in places:
                module.forward = _row_lookup(module, places)
                found.append(module)
        yield
    finally:
        for module in found:
            del module.forward


def _adds_rows(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Return whether a module is an embedding on the CPU without options that change its weights or gradients."""
    return (
        type(module) is nn.Embedding
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"  # the order of additions is fixed, unlike on CUDA
        and not (module.sparse or module.scale_grad_by_freq)
        and module.max_norm is None
    )


def _row_lookup(module: nn.Embedding, places: Mapping[nn.Parameter, Tensor]) -> Any:
    """Return a `forward` of an embedding whose backward pass adds to the place of the weight's gradient."""
    weight, padding = cast("nn.Parameter", module.weight), module.padding_idx

    def add(ids: Tensor, gradient: Tensor) -> None:
        place = places[weight]
        if weight.grad is None:
            weight.grad = place.zero_()
        if padding is not None:
            gradient = gradient.masked_fill((ids == padding)[..., None], 0)
        place.index_add_(0, ids.flatten(), gradient.reshape(-1, place.shape[1]).to(place.dtype))

    def forward(input: Tensor) -> Tensor:
        return cast("Tensor", _RowLookup.apply(weight, input, add))

    return forward


class _RowLookup(torch.autograd.Function):
    """`weight[ids]`, whose backward pass gives the rows' gradient to `add` and none to autograd."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        """Return the rows of the ids."""
        ctx.save_for_backward(ids)
        ctx.add = add
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Add the gradient of the rows."""
        (ids,) = ctx.saved_tensors
        ctx.add(ids, gradient)
        return None, None, None
