"""An optimiser's state as named tensors, for checkpoints, and back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_engine.optim.adamw import Optimizer
from rlhf_engine.optim.eight_bit import EightBitAdamW
from rlhf_engine.optim.offload import StagedAdamW

_QUANTISED = ("codes", "scale")
"""What a moment in 8 bits is made of; its table of values is a constant."""


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """State under names `<parameter number>.<name>`; a moment in 8 bits has two, `<name>.codes` and `<name>.scale`."""
    if isinstance(optimizer, StagedAdamW):
        optimizer.synchronize()
    return {
        f"{number}.{name}": tensor.contiguous()
        for number, parameter in enumerate(_parameters(optimizer))
        for name, tensor in _state(optimizer, parameter).items()
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor], source: Path) -> None:
    """Put back what `optimizer_tensors` gave; ValueError naming `source` and the first tensor that does not fit or lacks."""
    parameters, given = _parameters(optimizer), {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        place = int(number) if number.isdigit() else len(parameters)
        given.setdefault(place, {})[name] = (key, tensor)
    if not isinstance(optimizer, StagedAdamW):  # whose state is complete from the start
        (optimizer.inner if isinstance(optimizer, EightBitAdamW) else optimizer).state.clear()
    missing = []
    for place, found in given.items():
        room = _new_state(optimizer, parameters[place], found) if place < len(parameters) else {}
        for name, (key, tensor) in found.items():
            if name not in room or room[name].shape != tensor.shape:
                raise ValueError(f"{source}: got {key} of shape {tuple(tensor.shape)}, which fits no trained parameter")
            room[name].copy_(tensor)
        missing += [f"{place}.{name}" for name in room if name not in found]
    if missing:
        raise ValueError(f"{source}: got no {missing[0]}, expected it beside the others of its parameter")


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    if not isinstance(optimizer, EightBitAdamW):
        return optimizer.state.get(parameter, {})
    tensors = {} if parameter not in optimizer.masters else {"master": optimizer.masters[parameter].detach()}
    return tensors | _parts(optimizer.moments(parameter))


def _new_state(optimizer: Optimizer, parameter: nn.Parameter, found: Collection[str]) -> dict[str, Tensor]:
    """Tensors that a file's are copied into, after which they are the parameter's state; `found` are the names it has."""
    if isinstance(optimizer, EightBitAdamW):
        if set(found) != {"master"}:  # that of a parameter which was never stepped
            optimizer.new_moments(parameter)
    elif not isinstance(optimizer, StagedAdamW):
        moments = {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device)} | moments
    return _state(optimizer, parameter)


def _parts(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {}
    for name, value in moments.items():
        whole = not hasattr(value, _QUANTISED[0])
        parts |= {name: value} if whole else {f"{name}.{part}": getattr(value, part) for part in _QUANTISED}
    return parts
