"""Construction of the optimizer that a config describes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from rlhf_engine.config import OptimConfig
from rlhf_engine.memory.arena import SUM_DTYPE
from rlhf_engine.optim.adamw import HALF, AdamW, Optimizer
from rlhf_engine.optim.eight_bit import EightBitAdamW, moment_bytes
from rlhf_engine.optim.offload import StagedAdamW

OptimizerState = Literal["resident", "host", "8bit"]
"""Where and how the moments are stored; see `MemoryConfig.optimizer_state`."""


def state_bytes(trained: Iterable[Tensor], state: OptimizerState) -> int:
    """Return the bytes of the optimizer's state in a checkpoint: two moments, and float32 masters of half-precision weights."""
    total = 0
    for parameter in trained:
        elements, word = parameter.numel(), SUM_DTYPE.itemsize
        moment = moment_bytes(elements) if state == "8bit" else elements * word
        total += 2 * moment + (elements * word if parameter.dtype in HALF else 0)
    return total


def build_optimizer(model: nn.Module, config: OptimConfig, state: OptimizerState = "resident") -> Optimizer:
    """Return AdamW over the parameters that require a gradient, with weight decay only on those of two or more dimensions.

    A parameter with an attribute `lr_scale` has that many times the learning rate of the config. Half-precision parameters get
    float32 gradients, and float32 masters that are stepped instead of them.
    Source: Loshchilov & Hutter 2019, "Decoupled weight decay regularization".

    Raises:
        ValueError: 8-bit state is requested and torchao is missing, or `eps_form` is "raw". The epsilon of "raw"
            differs at each step, and torchao would compile the step for each value.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    half = [parameter for parameter in trained if parameter.dtype in HALF]
    for parameter in half:
        parameter.grad_dtype = SUM_DTYPE
    scales = dict.fromkeys(_lr_scale(parameter) for parameter in trained)
    groups: list[dict[str, Any]] = []
    for scale in scales:
        alike = [parameter for parameter in trained if _lr_scale(parameter) == scale]
        rate = {} if scale == 1.0 else {"lr": config.lr * scale, "initial_lr": config.lr * scale}
        groups += [
            {"params": [p for p in alike if p.dim() >= 2], "weight_decay": config.weight_decay, **rate},
            {"params": [p for p in alike if p.dim() < 2], "weight_decay": 0.0, **rate},
        ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if state == "8bit":
        if config.eps_form == "raw":
            raise ValueError("optim.eps_form: got 'raw', expected 'corrected' with memory.optimizer_state '8bit'")
        return EightBitAdamW(groups, **options)
    if state == "host" or half:
        return StagedAdamW(groups, host=state == "host", **options)
    return AdamW(groups, fused=True, **options)


def _lr_scale(parameter: nn.Parameter) -> float:
    return getattr(parameter, "lr_scale", 1.0)
