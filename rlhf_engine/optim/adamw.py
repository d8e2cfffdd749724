"""AdamW over a model's parameters, what a trainer needs of any optimizer, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rlhf_engine.config import OptimConfig

HALF = (torch.bfloat16, torch.float16)
"""Types of weights whose updates need a float32 master."""


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
        ...

    def allocate_from(self, take: Take) -> None:
        """Use `take` for the memory of state in transit."""

    def prefetch(self) -> None:
        """Start to copy the state of the next step to the device, while gradients are computed."""

    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's state by name, complete in memory; empty before its first step."""
        ...

    def new_tensors_of(self, parameter: nn.Parameter, names: Collection[str]) -> dict[str, Tensor]:
        """Make the state that `names` are the tensors of, and return it, to be filled from a checkpoint."""
        ...

    def clear(self) -> None:
        """Drop the state of all parameters, before one of a checkpoint is set."""

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any: ...


class ResidentState:
    """Mixin for a `torch.optim.Optimizer` whose state stays on the device: nothing is in transit."""

    transit_bytes = 0
    param_groups: list[dict[str, Any]]
    state: Any

    def allocate_from(self, take: Take) -> None:
        """Do nothing."""

    def prefetch(self) -> None:
        """Do nothing."""

    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's state by name."""
        return {name: value for name, value in self.state.get(parameter, {}).items() if isinstance(value, Tensor)}

    def new_tensors_of(self, parameter: nn.Parameter, names: Collection[str]) -> dict[str, Tensor]:
        """Make the state that `names` are the tensors of: a step count, and tensors of the parameter's shape."""
        step = {"step": torch.zeros((), device=parameter.device)} if "step" in names else {}
        self.state[parameter] = step | {name: torch.empty_like(parameter) for name in names if name != "step"}
        return self.tensors_of(parameter)

    def clear(self) -> None:
        """Drop the state of all parameters."""
        self.state.clear()


class Resident(ResidentState):
    """Any `torch.optim.Optimizer` as an `Optimizer` with resident state.

    The learning-rate schedule multiplies the rate that each of its groups has now.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.state, self.param_groups = inner, inner.state, inner.param_groups
        for group in inner.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def step(self) -> Any:
        """Step every parameter that has a gradient."""
        return self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self.inner.zero_grad(set_to_none)

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Call `hook` before every step."""
        return self.inner.register_step_pre_hook(hook)


class AdamW(ResidentState, torch.optim.AdamW):
    """`torch.optim.AdamW` with its state on the device."""

    def new_tensors_of(self, parameter: nn.Parameter, names: Collection[str]) -> dict[str, Tensor]:
        """Make both moments of a parameter, whatever `names` lacks."""
        return super().new_tensors_of(parameter, ("step", "exp_avg", "exp_avg_sq"))


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0 is the first) of `total_steps`.

    It climbs linearly over `warmup_steps`, then stays (constant) or falls to `final_lr_share * lr` at the last step
    along a line or half a cosine. A function of the step alone, so that a resumed run needs no state for it.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    passed = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    left = 1.0 - passed if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * passed))
    return config.lr * (config.final_lr_share + (1.0 - config.final_lr_share) * left)


def optimizer_step(
    optimizer: Optimizer, config: OptimConfig, step: int, total_steps: int
) -> tuple[torch.Tensor, float]:
    """Clip, step and clear the gradients; returns the gradient norm before clipping and the learning rate used.

    Raises FloatingPointError, with the weights as they were, if the norm is not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not bool(norm.isfinite()):
        raise FloatingPointError(
            f"training diverged: got a gradient norm of {float(norm)} at optimiser step {step + 1}, expected a finite one; "
            "a lower learning rate may help"
        )
    if config.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    rate = learning_rate(config, step, total_steps)
    for group in optimizer.param_groups:
        # An optimizer of the user's keeps the rates of its groups.
        group["lr"] = group["initial_lr"] * (rate / config.lr) if "initial_lr" in group else rate
        if config.eps_form == "raw":
            group["eps"] = raw_eps(optimizer, group, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, rate


def raw_eps(optimizer: Optimizer, group: dict[str, Any], config: OptimConfig) -> float:
    """The epsilon that, added after the bias correction, does what `config.eps` does before it, in the step to come.

        m_hat / (sqrt(v_hat) + e'),  e' = eps / sqrt(1 - beta_2^t),  is  m sqrt(1 - beta_2^t) / (1 - beta_1^t) / (sqrt(v) + eps)

    t is that of the group's first parameter with a gradient. Source: Kingma & Ba 2015, end of section 2.
    """
    first = next((parameter for parameter in group["params"] if parameter.grad is not None), None)
    done = 0.0 if first is None else float(optimizer.state.get(first, {}).get("step", 0.0))
    return config.eps / math.sqrt(1.0 - config.betas[1] ** (done + 1.0))
