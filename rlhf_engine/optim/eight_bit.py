"""AdamW whose moments are kept in 8 bits, by torchao (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization")."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_engine.optim.adamw import HALF, ResidentState

_QUANTISED = ("codes", "scale")
"""Tensors of a moment in 8 bits; its table of values is a constant."""

SMALLEST, BLOCK = 4096, 256
"""Elements of the smallest tensor that torchao quantises, and of a block, which has one float32 scale."""


def moment_bytes(elements: int) -> int:
    """Return the bytes of one moment of a parameter with so many elements: codes and scales, or float32."""
    if elements < SMALLEST or elements % BLOCK:
        return elements * torch.float32.itemsize
    return elements + elements // BLOCK * torch.float32.itemsize


class EightBitAdamW(ResidentState, torch.optim.Optimizer):
    """`torchao.optim.AdamW8bit` over the parameters, and over float32 masters of those in half precision.

    It quantises tensors of 4096 elements or more in blocks of 256; the rest stays in float32. A step is compiled for each shape
    of a parameter, which needs a C++ compiler on the CPU. Raises ValueError where torchao is not installed.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                f"memory.optimizer_state: got '8bit', which needs torchao, expected it installed (pip install "
                f"'rlhf-kernels[8bit]'): {error}"
            ) from None
        groups = list(groups)
        super().__init__(groups, options)
        self.masters = {
            parameter: nn.Parameter(parameter.detach().float())
            for group in groups
            for parameter in group["params"]
            if parameter.dtype in HALF
        }
        held = [group | {"params": [self.held(parameter) for parameter in group["params"]]} for group in groups]
        self.inner = AdamW8bit(held, block_size=BLOCK, **options)

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        """What torchao steps for a parameter."""
        return self.masters.get(parameter, parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Step every parameter that has a gradient."""
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs["lr"].fill_(ours["lr"])
        for parameter, master in self.masters.items():
            master.grad = parameter.grad
        self.inner.step()
        for parameter, master in self.masters.items():
            if master.grad is not None:
                parameter.copy_(master)
                master.grad = None

    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's master, and its moments, each as `<name>.codes` and `<name>.scale` where it is quantised."""
        tensors = {} if parameter not in self.masters else {"master": self.masters[parameter].detach()}
        for name, value in self.moments(parameter).items():
            quantised = hasattr(value, _QUANTISED[0])
            tensors |= {f"{name}.{part}": getattr(value, part) for part in _QUANTISED} if quantised else {name: value}
        return tensors

    def new_tensors_of(self, parameter: nn.Parameter, names: Collection[str]) -> dict[str, Tensor]:
        """Make the moments of a parameter that was stepped; one that never was has a master only."""
        if set(names) != {"master"}:
            self.new_moments(parameter)
        return self.tensors_of(parameter)

    def clear(self) -> None:
        """Drop the moments of all parameters."""
        self.inner.state.clear()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """`step`, `exp_avg` and `exp_avg_sq` of a parameter, empty before its first step."""
        return self.inner.state.get(self.held(parameter), {})

    def new_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Moments of a parameter that has not been stepped, which become its own."""
        held = self.held(parameter)
        state = {"step": torch.tensor(0.0)}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            state[name] = self.inner._new_buffer(held, signed)
        self.inner.state[held] = state
        return state
