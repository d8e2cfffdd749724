"""AdamW with moments in host memory, and with float32 masters for half-precision weights.

An update of a bfloat16 weight is often smaller than the spacing of bfloat16 numbers around it. The sum of updates is
therefore kept in a float32 master, and the weight is the rounded master. Masters are optimizer state like the moments.

State in host memory is copied to the device bucket by bucket, and back after the step. The device has memory for two
buckets: while one is stepped, a separate stream copies the next one in and the previous one out. The first two are
copied during the forward and backward passes of the minibatch (`prefetch`). This hides the copies as well as sampling
would, and takes no memory from its keys and values. On the CPU, where host and device share one memory, the copies run
too. They save nothing there, but they can be tested.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, cuda, nn
from torch.optim.adamw import adamw

from rlhf_engine.memory.arena import has_streams, room_for
from rlhf_engine.optim.adamw import HALF, Take

BUCKET_BYTES = 64 * 2**20
"""Bytes of state that are copied at a time: large enough for full copy speed, small compared with the whole state."""
_UNIT = 4096
"""Tensors are cut at multiples of this many elements, so that vector code has the same remainders as on the whole tensor."""


def most_in_transit(state_bytes: int, bucket_bytes: int = BUCKET_BYTES) -> int:
    """Return an upper bound of the device bytes that `state_bytes` of state need in transit: two buckets, or all of it."""
    return min(2 * bucket_bytes, state_bytes)


@dataclass(frozen=True)
class Piece:
    """The elements `start` to `stop` of one flattened parameter, which belongs to group number `group`."""

    parameter: nn.Parameter
    group: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor that has the parameter's shape."""
        return tensor.detach().view(-1)[self.start : self.stop]


def buckets(groups: Sequence[dict[str, Any]], most: int, each: Callable[[nn.Parameter], int]) -> list[list[Piece]]:
    """Return the parameters of all groups, in order, cut into buckets of at most `most` bytes.

    `each` returns the bytes per element of a parameter's state.
    """
    blocks: list[list[Piece]] = [[]]
    left = most
    assert most >= _UNIT * 12  # an empty bucket always has space for one unit
    for group, content in enumerate(groups):
        for parameter in content["params"]:
            start, size = 0, each(parameter)
            while start < parameter.numel():
                room = min(parameter.numel() - start, left // size)
                if room < parameter.numel() - start:
                    room = room // _UNIT * _UNIT
                if room == 0:
                    blocks.append([])
                    left = most
                    continue
                blocks[-1].append(Piece(parameter, group, start, start + room))
                start, left = start + room, left - room * size
    return blocks


class StagedAdamW(torch.optim.AdamW):
    """Fused AdamW with its state in host memory (`host`) or on the device. Each element is stepped as by `torch.optim.AdamW`.

    Masters are copied from the weights at construction. Code that writes weights later must write the masters as well.
    Each half-precision weight needs a float32 `grad_dtype`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        host: bool,
        bucket_bytes: int = BUCKET_BYTES,
        **options: Any,
    ) -> None:
        super().__init__(groups, fused=True, **options)
        self.host = host
        self._streams = has_streams(self.param_groups[0]["params"][0].device)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._new_state(parameter)
        self.buckets = buckets(self.param_groups, bucket_bytes, self._bytes_of_element)
        self._take: Take = self._allocate
        self._transit: _Transit | None = None
        self._stream = cuda.Stream() if host and self._streams else None

    @property
    def transit_bytes(self) -> int:
        """Device bytes of the state in transit; 0 if the state is on the device."""
        return sum(room_for((size,), torch.float32) for size in self._bucket_sizes()) if self.host else 0

    def allocate_from(self, take: Take) -> None:
        """Allocate state in transit with `take`."""
        self._take = take

    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's state by name, after all pending copies."""
        self.synchronize()
        return self.state[parameter]

    def new_tensors_of(self, parameter: nn.Parameter, names: Collection[str]) -> dict[str, Tensor]:
        """Return a parameter's state, which exists from construction on."""
        return self.tensors_of(parameter)

    def clear(self) -> None:
        """Do nothing: the state is allocated once and overwritten in place."""

    def prefetch(self) -> None:
        """Start to copy the first buckets to the device, if copies can run in the background."""
        if self._stream is not None:
            self._transit = self._new_transit()

    @torch.no_grad()
    def step(self) -> None:
        """Step every parameter that has a gradient."""
        if self.host:
            transit, self._transit = self._transit or self._new_transit(), None
            for number, bucket in enumerate(self.buckets):
                self._step(bucket, transit.arrived(number))
                transit.leave(number)
        else:
            for bucket in self.buckets:
                self._step(bucket, [self._parts(piece) for piece in bucket])
        for parameter, state in self.state.items():
            if parameter.grad is not None:
                state["step"] += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and prefetched state that no step has used."""
        self._transit = None
        super().zero_grad(set_to_none)

    def synchronize(self) -> None:
        """Wait until the state in host memory is complete."""
        if self._stream is not None:
            self._stream.synchronize()

    def _new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        device, pinned = ("cpu", self._streams) if self.host else (parameter.device, False)
        names = ["exp_avg", "exp_avg_sq"] + ["master"] * (parameter.dtype in HALF)
        state = {
            name: torch.zeros(parameter.shape, dtype=torch.float32, device=device, pin_memory=pinned) for name in names
        }
        if "master" in state:
            state["master"].copy_(parameter.detach())
        return {"step": torch.zeros((), device=parameter.device)} | state

    def _bytes_of_element(self, parameter: nn.Parameter) -> int:
        return 4 * (len(self.state[parameter]) - 1)

    def _parts(self, piece: Piece) -> dict[str, Tensor]:
        state = self.state[piece.parameter]
        return {name: piece.of(state[name]) for name in state if name != "step"}

    def _step(self, bucket: list[Piece], parts: list[dict[str, Tensor]]) -> None:
        for number, group in enumerate(self.param_groups):
            chosen = [
                (piece, part)
                for piece, part in zip(bucket, parts, strict=True)
                if piece.group == number and piece.parameter.grad is not None
            ]
            if not chosen:
                continue
            weights = [part.get("master", piece.of(piece.parameter)) for piece, part in chosen]
            beta1, beta2 = group["betas"]
            adamw(
                weights,
                [piece.of(grad) for piece, _ in chosen if (grad := piece.parameter.grad) is not None],
                [part["exp_avg"] for _, part in chosen],
                [part["exp_avg_sq"] for _, part in chosen],
                [],
                # Clones: a parameter in several pieces counts one step.
                [self.state[piece.parameter]["step"].clone() for piece, _ in chosen],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for piece, part in chosen:
                if "master" in part:
                    piece.of(piece.parameter).copy_(part["master"])

    def _bucket_sizes(self) -> list[int]:
        """Return the elements of the two vectors that buckets alternate between."""
        sizes = [
            sum((p.stop - p.start) * self._bytes_of_element(p.parameter) // 4 for p in bucket)
            for bucket in self.buckets
        ]
        return [max(sizes[first::2]) for first in (0, 1) if sizes[first::2]]

    def _new_transit(self) -> _Transit:
        vectors = [self._take((size,), torch.float32) for size in self._bucket_sizes()]
        return _Transit(vectors, [[self._parts(piece) for piece in bucket] for bucket in self.buckets], self._stream)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.param_groups[0]["params"][0].device)


class _Transit:
    """The state in transit of one step: buckets alternate between two vectors on the device."""

    def __init__(
        self,
        vectors: list[Tensor],
        parts: list[list[dict[str, Tensor]]],  # of each bucket, in host memory
        stream: Any,
    ) -> None:
        self.vectors, self.parts, self.stream = vectors, parts, stream
        self.staged: dict[int, list[dict[str, Tensor]]] = {}
        self.events: dict[int, Any] = {}
        if stream is not None:
            stream.wait_stream(cuda.current_stream())  # it may still read the old contents of their memory
        for number in range(min(2, len(parts))):
            self._arrive(number)

    def arrived(self, number: int) -> list[dict[str, Tensor]]:
        """Let the current stream wait for the bucket's copy, and return the state on the device."""
        if self.stream is not None:
            cuda.current_stream().wait_event(self.events.pop(number))
        return self.staged[number]

    def leave(self, number: int) -> None:
        """Copy a bucket back, and the bucket after the next into its vector."""
        if self.stream is not None:
            self.stream.wait_stream(cuda.current_stream())  # until the bucket is stepped
        with self._aside():
            for host, device in zip(self.parts[number], self.staged.pop(number), strict=True):
                for name, tensor in host.items():
                    tensor.copy_(device[name], non_blocking=True)
        if number + 2 < len(self.parts):
            self._arrive(number + 2)
        elif self.stream is not None:
            cuda.current_stream().wait_stream(self.stream)  # before the vectors' memory is reused

    def _arrive(self, number: int) -> None:
        vector, staged = self.vectors[number % 2], []
        with self._aside():
            at = 0
            for part in self.parts[number]:
                here = {}
                for name, tensor in part.items():
                    here[name] = vector[at : at + tensor.numel()].copy_(tensor, non_blocking=True)
                    at += tensor.numel()
                staged.append(here)
        self.staged[number] = staged
        if self.stream is not None:
            self.events[number] = self.stream.record_event()

    def _aside(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stream is None else cuda.stream(self.stream)
