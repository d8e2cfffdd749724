"""Frozen layers in host memory, whose weights reach the device one layer ahead of the pass that reads them.

Two vectors on the device take turns. While a layer computes from one of them, a second stream copies the weights of the next
layer into the other. A copy waits until the layer that read its vector before is done, and a layer waits for its copy. The
layer after the last one is the first one of the next pass. Without streams, on a CPU, every copy is complete at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, cuda, nn

from rlhf_engine.memory.arena import has_streams
from rlhf_engine.model.actor_critic import LanguageModel, frozen
from rlhf_engine.model.references import FrozenCopy
from rlhf_engine.model.trunk import outermost_layers

_ALIGNED = 256
"""Multiple of bytes at which a weight begins in a layer's vector."""


def layer_bytes(shapes: Sequence[tuple[int, int]]) -> int:
    """Return the bytes of a layer's vector; a weight is its number of elements and the bytes of one."""
    return sum(_aligned(count * size) for count, size in shapes)


def to_host(layer: nn.Module, *, pinned: bool) -> tuple[Tensor, dict[int, nn.Parameter]]:
    """Copy the weights of a layer into one vector in host memory.

    Return the vector, and the weights in it by the `id` of the originals.
    """
    weights = list(layer.parameters())
    vector = torch.empty(_bytes_of(weights), dtype=torch.uint8, pin_memory=pinned)
    copies = {}
    for weight, part in zip(weights, _parts(vector, weights), strict=True):
        part.copy_(weight.detach())
        copies[id(weight)] = nn.Parameter(part, requires_grad=False)
    return vector, copies


class StreamedCopy(FrozenCopy):
    """A frozen copy of the policy with its layers in host memory; embedding, last norm and output layer are on the device.

    Raises:
        ValueError: the model has no layers that can be copied one at a time, or layers that the policy does not train.
    """

    def __init__(self, policy: LanguageModel) -> None:
        if policy.adapters is not None or policy.top is not None:
            raise ValueError(
                "memory.reference: got 'host' for a policy with frozen layers, which its reference shares; expected 'device'"
            )
        parts = [to_host(layer, pinned=has_streams(policy.device)) for layer in outermost_layers(policy.trunk)]
        if not parts:
            raise ValueError(
                f"memory.reference: got 'host', expected 'device': {type(policy.model).__name__} has no layers that can be "
                "copied one at a time"
            )
        copies = {key: weight for _, weights in parts for key, weight in weights.items()}
        self.model = frozen(policy, without=policy.value, copies=copies)
        layers = list(outermost_layers(self.model.trunk))
        self.stream = LayerStream(layers, [vector for vector, _ in parts], policy.device)


class LayerStream:
    """Copies the weights of layers to `device` when they are called; `layers` and `vectors` are those of `to_host`.

    A layer's weights are on the device during its call only. Calls may be in any order, but only the next layer's weights are
    copied ahead. The calls have no gradients.
    """

    def __init__(self, layers: Sequence[nn.Module], vectors: Sequence[Tensor], device: torch.device) -> None:
        self.hosts = list(vectors)
        self.weights = [list(layer.parameters()) for layer in layers]
        self.kept = [[weight.data for weight in weights] for weights in self.weights]
        largest = max(vector.numel() for vector in vectors)
        self.device_vectors = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.stream: Any = cuda.Stream() if has_streams(device) else None
        if self.stream is not None:
            self.stream.wait_stream(cuda.current_stream())  # it may still read the old contents of their memory
        self.place = 0
        """The vector that the next copy fills."""
        self.arriving: dict[int, tuple[int, Any]] = {}
        """Layer -> its vector and the event at the end of its copy; at most one layer."""
        self.done: list[Any] = [None, None]
        """Events at the end of the last layer that read each vector."""
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter, number))
            layer.register_forward_hook(partial(self._leave, number), always_call=True)

    @property
    def device_bytes(self) -> int:
        """Bytes of the two vectors."""
        return sum(vector.numel() for vector in self.device_vectors)

    def _copy(self, number: int) -> None:
        """Start to copy a layer's weights."""
        place, host = self.place, self.hosts[number]
        self.place = 1 - place
        vector = self.device_vectors[place][: host.numel()]
        if self.stream is None:
            vector.copy_(host)
            self.arriving = {number: (place, None)}
            return
        with cuda.stream(self.stream):
            if self.done[place] is not None:
                self.stream.wait_event(self.done[place])
            vector.copy_(host, non_blocking=True)
            self.arriving = {number: (place, self.stream.record_event())}

    def _enter(self, number: int, layer: nn.Module, inputs: object) -> None:
        if number not in self.arriving:
            self._copy(number)
        place, arrived = self.arriving[number]
        if arrived is not None:
            cuda.current_stream().wait_event(arrived)
        weights = self.weights[number]
        for weight, part in zip(weights, _parts(self.device_vectors[place], weights), strict=True):
            weight.data = part
        self._copy((number + 1) % len(self.hosts))

    def _leave(self, number: int, layer: nn.Module, inputs: object, outputs: object) -> None:
        for weight, kept in zip(self.weights[number], self.kept[number], strict=True):
            weight.data = kept
        if self.stream is not None:
            # The next layer's copy has the other vector.
            self.done[self.place] = cuda.current_stream().record_event()


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED


def _bytes_of(weights: Sequence[Tensor]) -> int:
    return layer_bytes([(weight.numel(), weight.element_size()) for weight in weights])


def _parts(vector: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the part of each weight in a layer's vector, in its dtype and shape."""
    parts, start = [], 0
    for weight in weights:
        size = weight.numel() * weight.element_size()
        parts.append(vector[start : start + size].view(weight.dtype).view(weight.shape))
        start += _aligned(size)
    return parts
