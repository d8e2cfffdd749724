"""Weights, gradients and optimizer state sharded over the ranks, with FSDP2 (`torch.distributed.fsdp.fully_shard`).

A layer's weights are gathered for its forward pass and again for its backward pass, and its gradients are summed over the ranks
as soon as they are complete. A rank keeps one part of each weight, gradient and moment. Scalars, such as the bias of a value
head, stay whole on every rank.
Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_engine.distributed.ranks import is_sharded


def make_mesh(replicate: int, shard: int, device_type: str) -> Any:
    """Return the mesh of `replicate` copies of the weights, each sharded over `shard` ranks with consecutive numbers."""
    from torch.distributed.device_mesh import init_device_mesh

    if replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, layers: Iterable[nn.Module], mesh: Any, outputs: type) -> None:
    """Shard a model in place: each of `layers` is gathered by itself, and the remaining weights with the call of `model`.

    `outputs` is the dataclass that `model` returns. FSDP2 finds its tensors, whose backward passes need the weights again.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    assert is_dataclass(outputs)
    if outputs not in _REGISTERED:
        torch.export.register_dataclass(outputs)
        _REGISTERED.add(outputs)
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    for module in _parts(model):
        assert isinstance(module, FSDPModule)
        # The loss of a pass has the denominators of all ranks, so gradients are summed and not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


_REGISTERED: set[type] = set()


def _parts(model: nn.Module) -> list[Any]:
    """Return the modules that are gathered together; none if the model is not sharded."""
    return [module for module in model.modules() if hasattr(module, "set_reshard_after_forward")]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Gather all weights of a model once, so that its parameters are plain tensors and its calls gather nothing.

    All ranks must enter. Does nothing for a model that is not sharded.
    """
    parts = _parts(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded, without communication."""
    if not is_sharded(tensor):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    place = cast("Any", tensor)
    value = value.detach().to(tensor.device)
    place.copy_(distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return cast("Any", tensor).to_local() if is_sharded(tensor) else tensor


def total_norm(gradients: list[Tensor]) -> Tensor:  # ()
    """Return the norm of all gradients together. Squares of parts are added in the order of the ranks: equal bits on all."""
    whole_ones = [gradient for gradient in gradients if not is_sharded(gradient)]
    norm = nn.utils.get_total_norm(whole_ones)
    parts = [cast("Any", gradient) for gradient in gradients if is_sharded(gradient)]
    if not parts:
        return norm
    group = parts[0].device_mesh.get_group("shard")
    square = torch.stack([part.to_local().double().square().sum() for part in parts]).sum()
    every = [torch.zeros_like(square) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, square, group=group)
    total = norm.to(square).square()
    for one in every:
        total = total + one
    return total.sqrt().float()


def held_bytes(parameters: Iterable[Tensor]) -> int:
    """Return the bytes that this rank holds of some tensors."""
    return sum(local(parameter.detach()).nbytes for parameter in parameters)
