"""An optimizer's state as named tensors, for checkpoints, and back."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from rlhf_engine.optim.adamw import Optimizer


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state under names `<parameter number>.<name>`."""
    return {
        f"{number}.{name}": tensor.contiguous()
        for number, parameter in enumerate(_parameters(optimizer))
        for name, tensor in optimizer.tensors_of(parameter).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor], source: Path) -> None:
    """Set what `optimizer_tensors` returned; ValueError naming `source` and the tensor that does not fit or is missing."""
    parameters = _parameters(optimizer)
    given: dict[int, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        place = int(number) if number.isdigit() else len(parameters)
        given.setdefault(place, {})[name] = (key, tensor)
    optimizer.clear()
    missing = []
    for place, found in given.items():
        state = optimizer.new_tensors_of(parameters[place], found) if place < len(parameters) else {}
        for name, (key, tensor) in found.items():
            if name not in state or state[name].shape != tensor.shape:
                raise ValueError(f"{source}: got {key} of shape {tuple(tensor.shape)}, which fits no trained parameter")
            state[name].copy_(tensor)
        missing += [f"{place}.{name}" for name in state if name not in found]
    if missing:
        raise ValueError(f"{source}: the tensor {missing[0]} is missing; the other tensors of its parameter are there")


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
