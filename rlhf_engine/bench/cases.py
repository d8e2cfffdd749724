"""One case per op: its inputs on any device, its call with any backend, and the bytes and FLOPs that it cannot avoid.

The gate of a case compares its outputs and gradients on few tokens with eager PyTorch in float64. An error may be at most
twice that of eager PyTorch in the same dtype, plus 2 eps of the output's scale, as in the kernels' tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.info import choices

Inputs = dict[str, Any]
GATE_TOKENS = 16
"""Tokens of the comparison with float64."""


@dataclass(frozen=True)
class Case:
    """An op at one shape.

    `make(tokens, device)` returns its inputs, and `call(inputs, backend)` its outputs, of which the first is summed and
    differentiated if there are `leaves`.
    """

    name: str
    op: str
    """Name of the public function."""
    shape: str
    tokens: int
    """Tokens of the timed call."""
    make: Callable[[int, torch.device], Inputs]
    call: Callable[[Inputs, str], tuple[Tensor, ...]]
    moved: int
    """Bytes that a call has to read and write."""
    flops: int
    """FLOPs of the matrix products that a call needs; element-wise arithmetic is not counted."""
    need: int
    """Bytes of inputs, gradients and the largest temporary tensors of the op and of eager PyTorch."""
    leaves: tuple[str, ...] = ()
    """Inputs that receive gradients."""
    eager: bool = True
    """Whether eager PyTorch is timed too."""
    judge: Callable[[Inputs, tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    """What the gate compares, computed from inputs and outputs; None: the outputs."""

    def step(self, inputs: Inputs, backend: str) -> Callable[[], object]:
        """Return the call that is timed: forward, and backward if there are leaves."""
        leaves = [inputs[name].requires_grad_() for name in self.leaves]

        def run() -> None:
            for leaf in leaves:
                leaf.grad = None
            outputs = self.call(inputs, backend)
            if leaves:
                outputs[0].sum().backward()

        return run

    def results(self, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        """Return what the gate compares: outputs and gradients."""
        leaves = [inputs[name].detach().clone().requires_grad_() for name in self.leaves]
        inputs = inputs | dict(zip(self.leaves, leaves, strict=True))
        outputs = self.call(inputs, backend)
        compared = outputs if self.judge is None else self.judge(inputs, outputs)
        gradients = torch.autograd.grad(outputs[0].sum(), leaves) if leaves else ()
        return tuple(x.detach() for x in (*compared, *gradients))


@dataclass(frozen=True)
class Gate:
    """The largest error of a case against float64, next to eager PyTorch's in the same dtype."""

    error: float
    eager: float
    bound: float
    passed: bool


def check(case: Case, device: torch.device) -> Gate:
    """Compare a case with float64 on few tokens; the result is of the output whose error is the largest share of its bound."""
    inputs = case.make(min(case.tokens, GATE_TOKENS), device)
    wide = {name: _wide(value) for name, value in inputs.items()}
    runs = (case.results(inputs, "auto"), case.results(inputs, "reference"), case.results(wide, "reference"))
    found = [_compared(*parts) for parts in zip(*runs, strict=True)]
    return max(found, key=lambda gate: (not gate.passed, gate.error / gate.bound if gate.bound else 0.0))


def _wide(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _compared(got: Tensor, eager: Tensor, exact: Tensor) -> Gate:
    truth = exact.double()
    error, allowed = ((x.double() - truth).abs().max() for x in (got, eager))
    bound = 2 * allowed + 2 * torch.finfo(got.dtype).eps * truth.abs().max().clamp(min=1e-30)
    return Gate(float(error), float(allowed), float(bound), bool(error <= bound))  # NaN fails


def backends(device: torch.device) -> Mapping[str, str]:
    """Return the backend that each op uses on a device."""
    wanted = "float64"
    return {op: backend for op, where, dtypes, backend, _ in choices() if where == device.type and dtypes != wanted}


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """Return a generator, so that a case has the same inputs in every run."""
    return torch.Generator(device).manual_seed(seed)
