"""AdamW over a model's parameters and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from rlhf_engine.config import OptimConfig
from rlhf_engine.memory.gradients import SUM_DTYPE
from rlhf_engine.optim.eight_bit import EightBitAdamW
from rlhf_engine.optim.offload import HALF, StagedAdamW
from rlhf_engine.optim.protocol import Optimizer, ResidentState
from rlhf_engine.optim.schedule import learning_rate

OptimizerState = Literal["resident", "host", "8bit"]
"""Where moments live, `MemoryConfig.optimizer_state`."""


class AdamW(ResidentState, torch.optim.AdamW):
    """`torch.optim.AdamW` with its state on the device."""


def build_optimizer(model: nn.Module, config: OptimConfig, state: OptimizerState = "resident") -> Optimizer:
    """Return fused AdamW over the parameters that require a gradient; only matrices are decayed.

    Half-precision parameters get float32 gradients, and float32 masters that are stepped in their place. ValueError for 8 bits
    if torchao is missing or with `eps_form` "raw", whose epsilon differs at each step: torchao would compile each of them.
    Source: Loshchilov & Hutter 2019, "Decoupled weight decay regularization".
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    half = [parameter for parameter in trained if parameter.dtype in HALF]
    for parameter in half:
        parameter.grad_dtype = SUM_DTYPE
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if state == "8bit":
        if config.eps_form == "raw":
            raise ValueError("optim.eps_form: got 'raw', expected 'corrected' with memory.optimizer_state '8bit'")
        return EightBitAdamW(groups, **options)
    if state == "host" or half:
        cuda = torch.cuda if trained[0].is_cuda else None
        return StagedAdamW(groups, host=state == "host", cuda=cuda, **options)
    return AdamW(groups, fused=True, **options)


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
        group["lr"] = rate
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
