"""AdamW, the optimizer protocol that trainers use, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rlhf_engine.config import OptimConfig
from rlhf_engine.distributed.fsdp import total_norm

HALF = (torch.bfloat16, torch.float16)
"""Dtypes of weights whose updates need a float32 master."""


Take = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""`take(shape, dtype)` returns an uninitialised tensor on the device, for example from an arena."""


@runtime_checkable
class Optimizer(Protocol):
    """An optimizer whose state may be in host memory and is copied to the device for each step."""

    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def transit_bytes(self) -> int:
        """Device bytes of the state in transit; 0 if the state is resident."""
        ...

    def allocate_from(self, take: Take) -> None:
        """Allocate state in transit with `take`."""

    def prefetch(self) -> None:
        """Start to copy the state of the next step to the device, while gradients are computed."""

    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's state by name, after all pending copies; it may be empty before the first step."""
        ...

    def new_tensors_of(self, parameter: nn.Parameter, names: Collection[str]) -> dict[str, Tensor]:
        """Create and return the state whose tensors in a checkpoint have these `names`, to be filled from it."""
        ...

    def clear(self) -> None:
        """Drop the state of all parameters, before state from a checkpoint is loaded."""

    def step(self) -> Any:
        """Step every parameter that has a gradient."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        ...

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> Any:
        """Call `hook` before every step."""
        ...


class ResidentState:
    """Mixin for a `torch.optim.Optimizer` whose state stays on the device, so that none is in transit."""

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
        """Create and return the state with these `names`: a step count, and tensors of the parameter's shape."""
        step = {"step": torch.zeros((), device=parameter.device)} if "step" in names else {}
        self.state[parameter] = step | {name: torch.empty_like(parameter) for name in names if name != "step"}
        return self.tensors_of(parameter)

    def clear(self) -> None:
        """Drop the state of all parameters."""
        self.state.clear()


class Resident(ResidentState):
    """Any `torch.optim.Optimizer` as an `Optimizer` with resident state.

    The learning-rate schedule scales the rate that each parameter group has at construction.
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
        """Create and return the step count and both moments of a parameter, even if `names` lacks some of them."""
        return super().new_tensors_of(parameter, ("step", "exp_avg", "exp_avg_sq"))


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step `step` (0 is the first) of `total_steps`.

    It rises linearly over `warmup_steps`. Then it stays constant, or falls to `final_lr_share * lr` at the last step,
    linearly or along half a cosine. It depends only on the step, so a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    left = _left(config, step - config.warmup_steps, total_steps - 1 - config.warmup_steps)
    return config.lr * (config.final_lr_share + (1.0 - config.final_lr_share) * left)


class Schedule:
    """The learning rate of every optimizer step of a run, whose planned length may change when it is resumed.

    Until then it is `learning_rate`. From the step at which the length changes, the rate falls from the value that it has
    there to `final_lr_share * lr` at the new last step, so that there is no jump.
    """

    def __init__(self, config: OptimConfig, total_steps: int) -> None:
        self.config = config
        self.planned = [(0, total_steps)]
        """(first step, total steps) of every plan; a plan holds from its first step on."""

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (0 is the first)."""
        return self._rate(step, len(self.planned) - 1)

    def replan(self, first: int, total_steps: int) -> bool:
        """Plan the steps from `first` on for `total_steps` in all; return whether a later rate changes."""
        if total_steps == self.planned[-1][1]:
            return False
        self.planned = [*(plan for plan in self.planned if plan[0] < first), (first, total_steps)]
        return self.config.schedule != "constant"

    def _rate(self, step: int, plan: int) -> float:
        first, total = self.planned[plan]
        if plan == 0 or first <= self.config.warmup_steps:
            return learning_rate(self.config, step, total)
        if self.config.schedule == "constant":
            return self.config.lr
        final = self.config.final_lr_share * self.config.lr
        left = _left(self.config, step - first, total - 1 - first)
        return final + (self._rate(first, plan - 1) - final) * left


def _left(config: OptimConfig, step: int, last: int) -> float:
    """Return the share of the fall to the final learning rate that is left at `step`, between 1 at 0 and 0 at `last`."""
    passed = min(1.0, step / max(1, last))
    return 1.0 - passed if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * passed))


def gradient_norm(optimizer: Optimizer) -> Tensor:  # ()
    """Return the norm of all gradients together."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return total_norm([p.grad for p in parameters if p.grad is not None])


def wrong_norm(norm: Tensor, step: int) -> str:
    """Return the message for a gradient norm that is not finite at optimizer step `step` (0 is the first)."""
    return (
        f"training diverged: got a gradient norm of {float(norm)} at optimizer step {step + 1}, expected a finite one"
    )


def optimizer_step(
    optimizer: Optimizer, config: OptimConfig, step: int, schedule: Schedule | int, norm: Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Clip the gradients, step the optimizer and drop the gradients.

    `schedule` gives the learning rates; a number of steps is the schedule of a run of that length. `norm` is the gradient norm
    if it is already computed.

    Returns:
        The gradient norm before clipping, and the learning rate of the step.

    Raises:
        FloatingPointError: the norm is not finite. The weights are unchanged.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if norm is None:
        norm = gradient_norm(optimizer)
    if not bool(norm.isfinite()):
        raise FloatingPointError(f"{wrong_norm(norm, step)}; try a lower learning rate")
    if config.max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    rate = schedule.rate(step) if isinstance(schedule, Schedule) else learning_rate(config, step, schedule)
    for group in optimizer.param_groups:
        # The groups of a user's optimizer keep the ratios of their rates.
        group["lr"] = group["initial_lr"] * (rate / config.lr) if "initial_lr" in group else rate
        if config.eps_form == "raw":
            group["eps"] = raw_eps(optimizer, group, config)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, rate


def raw_eps(optimizer: Optimizer, group: dict[str, Any], config: OptimConfig) -> float:
    """Return the epsilon that has the same effect after the bias correction as `config.eps` before it, for the next step.

        m_hat / (sqrt(v_hat) + e')  =  m sqrt(1 - beta_2^t) / (1 - beta_1^t) / (sqrt(v) + eps),  e' = eps / sqrt(1 - beta_2^t)

    where t is the step count of the group's first parameter that has a gradient.
    Source: Kingma & Ba 2015, end of section 2.
    """
    first = next((parameter for parameter in group["params"] if parameter.grad is not None), None)
    done = 0.0 if first is None else float(optimizer.state.get(first, {}).get("step", 0.0))
    return config.eps / math.sqrt(1.0 - config.betas[1] ** (done + 1.0))
