"""AdamW with decay on matrices only, and its learning-rate schedule, for every stage."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from rlhf_engine.config import OptimConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that want gradients; vectors (norms, biases) are not decayed."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Learning rate of optimiser step `step` (0 is the first) of `total`.

    It climbs linearly over `warmup_steps` to `lr`, then stays, or falls to `final_lr_share * lr` at the last step.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - 1 - config.warmup_steps))
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_share + (1.0 - config.final_lr_share) * left)


def optimizer_step(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total: int) -> float:
    """Clips the gradients, sets the learning rate, steps and clears them; returns the gradient norm before clipping.

    Raises:
        FloatingPointError: the gradient norm is not finite; the weights are left as they were.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm: got {norm} at step {step}, expected a finite number")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step, total)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
