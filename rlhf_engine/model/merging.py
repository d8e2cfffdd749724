"""Weights with an adapter added to them for a rollout, so that a decode step has one product per layer instead of three.

    W' = W + s B A

The sum is computed in float32 and rounded once to the dtype of W. With float32 weights the log-probs differ from those of
the separate products by rounding errors of float32. In half precision W' differs from what is trained by the rounding of
its own dtype. Legend: R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

_ALIGNED = 64
"""Multiple of bytes at which the weight of a layer begins, as in torch's allocations."""
_PART = 2**22
"""Elements of a sum that are in float32 at a time."""


Layers = Mapping[str, Any]
"""Layers of peft with an adapter, by their names."""


def frozen_weights(layers: Layers, name: str) -> dict[str, Tensor]:
    """Return the frozen weight W of each layer of the adapter `name`.

    Raises:
        ValueError: the weights of a layer are quantised.
    """
    found = {place: layer.get_base_layer().weight for place, layer in layers.items()}
    for place, weight in found.items():
        if weight.dtype != layers[place].lora_A[name].weight.dtype:
            raise ValueError(
                f"rollout.merge_adapters: got 'always' for the quantised layer {place}, expected 'auto' or 'never'"
            )
    return found


def merged_bytes(layers: Layers, name: str) -> int:
    """Return the bytes that `sums_in_place` allocates."""
    return sum(map(_room, frozen_weights(layers, name).values()))


@contextmanager
def sums_in_place(
    layers: Layers, name: str, allocate: Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]
) -> Iterator[None]:
    """Let the frozen weights of the layers contain the adapter `name` inside the `with` block.

    `allocate` provides the memory of the sums. W itself is unchanged, and is the weight again afterwards.
    """
    weights, start = frozen_weights(layers, name), 0
    device = next(iter(weights.values())).device
    buffer = allocate((sum(map(_room, weights.values())),), torch.uint8, device)
    originals = {place: weight.data for place, weight in weights.items()}
    try:
        for place, weight in weights.items():
            part = buffer[start : start + weight.numel() * weight.element_size()].view(weight.dtype)
            weight.data = _add(layers[place], name, originals[place], part.view(weight.shape))
            start += _room(weight)
        yield
    finally:
        for place, weight in weights.items():
            weight.data = originals[place]


def _room(weight: Tensor) -> int:
    return -(-weight.numel() * weight.element_size() // _ALIGNED) * _ALIGNED


@torch.no_grad()
def _add(layer: Any, name: str, weight: Tensor, out: Tensor) -> Tensor:
    """Write `W + s B A` to `out` and return it; W is (O, I), and (I, O) for GPT-2's layers."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # (R, I), (O, R)
    left, right = (a.t(), b.t()) if isinstance(layer.get_base_layer(), Conv1D) else (b, a)
    rows = max(1, _PART // weight.shape[1])
    for part, ours, result in zip(weight.split(rows), left.split(rows), out.split(rows), strict=True):
        result.copy_(torch.addmm(part.float(), ours.float(), right.float(), alpha=layer.scaling[name]))
    return out
