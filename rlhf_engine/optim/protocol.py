"""What a trainer needs of an optimizer beyond `torch.optim.Optimizer`: where its state is while a step is prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Take = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""`take(shape, dtype)` returns memory on the device that may hold anything, such as an arena's."""


@runtime_checkable
class Optimizer(Protocol):
    """An optimizer whose state may be in host memory and is copied to the device for each step."""

    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def transit_bytes(self) -> int:
        """Bytes on the device of the state in transit; 0 where the state is resident."""

    def allocate_from(self, take: Take) -> None:
        """Use `take` for the memory of state in transit."""

    def prefetch(self) -> None:
        """Start to copy the state of the next step to the device, while gradients are computed."""

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any: ...


class ResidentState:
    """Mixin for an optimizer whose state stays on the device: nothing is in transit."""

    transit_bytes = 0

    def allocate_from(self, take: Take) -> None:
        """Do nothing."""

    def prefetch(self) -> None:
        """Do nothing."""


class Resident(ResidentState):
    """Any `torch.optim.Optimizer` as an `Optimizer` with resident state."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
