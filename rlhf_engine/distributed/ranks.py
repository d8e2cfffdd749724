"""The processes of a run: which sequences each of them computes, and sums over all of them.

A run is data parallel. Every rank holds the whole rollout, which is small, and computes passes only over the sequences that it
was dealt. What the passes return is joined, so that every rank computes advantages, statistics and decisions from equal tensors
with the code of one process. They have equal bits on all ranks, and need no sums of parts.
Shapes: B sequences, T positions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_engine.distributed.failure import register
from rlhf_engine.distributed.launch import process_count

Value = TypeVar("Value")

_BUCKET = 2**25
"""Most elements of gradients that one collective sums."""


class Ranks:
    """The ranks of a run, here of one with a single process: it computes everything, and a sum over ranks is its own term."""

    rank = 0
    """Number of this process."""
    size = 1
    """Number of processes."""

    @property
    def first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def shares(self, lengths: Tensor) -> list[Tensor]:  # (B,) -> per rank (its rows,), int64, ascending
        """Return the rows that each rank computes, given the length of each row.

        Rows are dealt in turn from long to short. The numbers of rows of two ranks differ by at most 1, and the sums of their
        lengths by at most the longest length.
        """
        order = lengths.argsort(stable=True, descending=True)
        return [order[rank :: self.size].sort().values for rank in range(self.size)]

    def join(self, rows: Tensor, shares: list[Tensor], fill: int = 0) -> Tensor:  # (its rows, ...) -> (B, ...)
        """Return the rows of all ranks in their order before `shares`; rows that are narrower are filled up with `fill`."""
        return rows

    def merge(self, tensor: Tensor) -> Tensor:
        """Return the sum of tensors of which each element is 0 on all ranks but one, which is exact; may change `tensor`."""
        return tensor

    def sum_metrics(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over the ranks, in the order of the ranks; of names that end in `_max` the maxima."""
        return metrics

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients of parameters that are whole on every rank by their sums; FSDP2 sums those of sharded ones."""

    def each(self, value: Value) -> list[Value]:
        """Return the value of every rank."""
        return [value]

    def check_equal(self, values: Mapping[str, object]) -> None:
        """Raise ValueError that names the first of `values` that differs between two ranks."""
        every = self.each(dict(values))
        for name, ours in every[0].items():
            for rank, theirs in enumerate(every):
                if theirs.get(name) != ours:
                    raise ValueError(
                        f"{name}: rank 0 has {ours!r} and rank {rank} has {theirs.get(name)!r}; start all ranks with the same "
                        "config, data and models"
                    )


ONE = Ranks()
"""A run with one process."""


class ProcessRanks(Ranks):
    """The ranks of the default process group of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def join(self, rows: Tensor, shares: list[Tensor], fill: int = 0) -> Tensor:
        """Gather padded rows of equal shape from all ranks."""
        most = max(map(len, shares))
        widths = torch.tensor(rows.shape[1:], device=rows.device)
        if len(widths):
            dist.all_reduce(widths, dist.ReduceOp.MAX)
        shape = (most, *widths.tolist())
        ours = rows.new_full(shape, fill)
        ours[tuple(slice(0, length) for length in rows.shape)] = rows
        found = rows.new_full((sum(map(len, shares)), *shape[1:]), fill)
        for share, theirs in zip(shares, self._gathered(ours), strict=True):
            found[share] = theirs[: len(share)]
        return found

    def merge(self, tensor: Tensor) -> Tensor:
        """Sum with one collective; its order does not matter, because no two terms are both different from 0."""
        dist.all_reduce(tensor)
        return tensor

    def sum_metrics(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather the metrics of all ranks, and add them in the order of the ranks."""
        names = list(metrics)
        rows = self._gathered(torch.stack([metrics[name].detach().float() for name in names]))
        total = rows[0]
        for row in rows[1:]:
            total = total + row
        most = torch.stack(rows).amax(0)
        return {name: (most if name.endswith("_max") else total)[at] for at, name in enumerate(names)}

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients in buckets. A collective gives all ranks equal bits, in an order that its library fixes."""
        gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def each(self, value: Value) -> list[Value]:
        """Gather a small Python object of every rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        found = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(found, sent)
        return [one.to(tensor.dtype) for one in found]


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Split gradients in their order into lists of one dtype with at most `_BUCKET` elements, or one larger gradient."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (
            bucket[0].dtype != gradient.dtype or sum(g.numel() for g in bucket) + gradient.numel() > _BUCKET
        ):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this rank holds a part."""
    return hasattr(tensor, "placements")


def current() -> Ranks:
    """Return the ranks of the process group that is open."""
    grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return ProcessRanks() if grouped else ONE


@contextmanager
def joined(device: str, timeout: float) -> Iterator[Ranks]:
    """Open the process group of the processes that torchrun started; yield this one's ranks.

    A group that is open already is used, and left open. Without torchrun, the run has one process.

    Args:
        device: the config's device, on which the collectives run: gloo on the CPU, NCCL on CUDA.
        timeout: seconds after which a collective fails for which a rank does not arrive.

    Raises:
        ValueError: the device is not one that several ranks can use.
    """
    if dist.is_available() and dist.is_initialized():
        _check_backend(device)
        yield current()
        return
    if process_count() == 1:
        yield ONE
        return
    _enter_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    register()
    yield current()
    dist.destroy_process_group()  # not after an exception: other ranks may still be in a collective


def _enter_device(device: str, local_rank: int) -> None:
    """Select the GPU of this process, whose number on its node is `local_rank`."""
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"device: got {device!r} with several ranks, expected 'cpu' or 'cuda'; each rank takes the GPU with its number"
        )
    if device == "cuda":
        visible = torch.cuda.device_count()
        if local_rank >= visible:
            raise ValueError(
                f"device: got 'cuda' for rank {local_rank} of this node, which has {visible} visible GPUs; start at most "
                f"{visible} ranks per node (torchrun --nproc-per-node, or --gpus)"
            )
        torch.cuda.set_device(local_rank)


def _check_backend(device: str) -> None:
    if device.startswith("cuda") and dist.get_world_size() > 1 and "nccl" not in str(dist.get_backend_config()):
        raise ValueError(
            f"device: got {device!r} with a process group of gloo, which sums no CUDA tensors; open the group with backend "
            "'cpu:gloo,cuda:nccl', or set device=cpu"
        )
