"""Gradients in room that is lent for one phase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rlhf_engine.memory.arena import Arena, room_for

SUM_DTYPE = torch.float32
"""Type in which gradients are summed, of half-precision weights too."""


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """What a parameter's gradients are summed in."""
    return parameter.grad_dtype or parameter.dtype


def gradient_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes that the gradients of `parameters` take in an arena."""
    return sum(room_for(tuple(p.shape), gradient_dtype(p)) for p in parameters)


@contextmanager
def gradients_in(arena: Arena, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While the context is open, gradients of `parameters` lie in the arena; after it there are none.

    A gradient is moved to its place when the first backward pass has made it, and later ones are added to it there. So a
    parameter that no backward pass reaches has none, as without an arena, and `zero_grad(set_to_none=True)` begins anew.
    """
    places: dict[nn.Parameter, Tensor] = {}
    hooks = []

    def move(parameter: nn.Parameter) -> None:
        place = places[parameter]
        if parameter.grad.data_ptr() != place.data_ptr():
            parameter.grad = place.copy_(parameter.grad)

    try:
        for parameter in parameters:
            room = arena.take((parameter.numel(),), gradient_dtype(parameter))
            # Strides as the parameter has them, as autograd gives them to a gradient of its own.
            places[parameter] = room.as_strided(parameter.shape, parameter.stride())
            hooks.append(parameter.register_post_accumulate_grad_hook(move))
        room = None
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in places:
            parameter.grad = None
        places.clear()
