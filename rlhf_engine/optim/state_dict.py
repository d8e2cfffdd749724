"""Conversion of an optimizer's state to named tensors and back, for checkpoints."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from rlhf_engine.distributed.fsdp import assign
from rlhf_engine.optim.adamw import Optimizer


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state under the names `<parameter number>.<name>`; that of a sharded parameter is sharded."""
    return {
        f"{number}.{name}": tensor.contiguous()
        for number, parameter in enumerate(_parameters(optimizer))
        for name, tensor in optimizer.tensors_of(parameter).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor], source: Path) -> None:
    """Load what `optimizer_tensors` returned.

    Raises:
        ValueError: a tensor does not fit or is missing. The message names `source` and the tensor.
    """
    parameters = _parameters(optimizer)
    given: dict[int, dict[str, tuple[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        place = int(number) if number.isdecimal() else len(parameters)
        given.setdefault(place, {})[name] = (key, tensor)
    optimizer.clear()
    missing = []
    for place, found in given.items():
        state = optimizer.new_tensors_of(parameters[place], found) if place < len(parameters) else {}
        for name, (key, tensor) in found.items():
            kind = None if name not in state else (state[name].shape, state[name].dtype)
            if kind != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"{source}: the tensor {key} of {tensor.dtype} and shape {tuple(tensor.shape)} fits no trained parameter; "
                    "expected the checkpoint of a run with the same model and optimizer"
                )
            assign(state[name], tensor)
        missing += [f"{place}.{name}" for name in state if name not in found]
    if missing:
        raise ValueError(
            f"{source}: the tensor {missing[0]} is missing, although the file has other tensors of its parameter"
        )


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
