"""AdamW with 8-bit moments, by torchao (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization")."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_engine.optim.adamw import HALF, ResidentState

_QUANTISED = ("codes", "scale")
"""Tensors of an 8-bit moment that a checkpoint stores; its table of values is a constant."""

SMALLEST, BLOCK = 4096, 256
"""Elements of the smallest tensor that torchao quantises, and elements of a block, which has one float32 scale."""


def moment_bytes(elements: int) -> int:
    """Return the bytes of one moment of a parameter with `elements` elements: 8-bit codes and scales, or float32."""
    if elements < SMALLEST or elements % BLOCK:
        return elements * torch.float32.itemsize
    return elements + elements // BLOCK * torch.float32.itemsize


class EightBitAdamW(ResidentState, torch.optim.Optimizer):
    """`torchao.optim.AdamW8bit` over the parameters, with float32 masters for those in half precision.

    torchao quantises the moments of tensors of at least 4096 elements in whole blocks of 256. Other moments stay in
    float32. The step is compiled for each parameter shape, which needs a C++ compiler on the CPU.

    Raises:
        ValueError: torchao is not installed.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                f"memory.optimizer_state: '8bit' needs torchao, which cannot be imported; run pip install "
                f"'rlhf-kernels[8bit]' ({error})"
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
        """Return the parameter that torchao steps: the float32 master if there is one, otherwise the parameter itself."""
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
        """Return a parameter's master and its moments; a quantised moment as `<name>.codes` and `<name>.scale`."""
        tensors = {} if parameter not in self.masters else {"master": self.masters[parameter].detach()}
        for name, value in self.moments(parameter).items():
            quantised = hasattr(value, _QUANTISED[0])
            tensors |= {f"{name}.{part}": getattr(value, part) for part in _QUANTISED} if quantised else {name: value}
        return tensors

    def new_tensors_of(self, parameter: nn.Parameter, names: Collection[str]) -> dict[str, Tensor]:
        """Return the master and new moments of a parameter; only the master if it was saved before its first step."""
        if set(names) != {"master"}:
            self.new_moments(parameter)
        return self.tensors_of(parameter)

    def clear(self) -> None:
        """Drop the moments of all parameters."""
        self.inner.state.clear()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return `step`, `exp_avg` and `exp_avg_sq` of a parameter; empty before its first step."""
        return self.inner.state.get(self.held(parameter), {})

    def new_moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Create, set and return the moments of a parameter that has not been stepped."""
        held = self.held(parameter)
        state = {"step": torch.tensor(0.0)}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            state[name] = self.inner._new_buffer(held, signed)
        self.inner.state[held] = state
        return state
