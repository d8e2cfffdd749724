"""The learning rate of every optimizer step."""

from __future__ import annotations

import math

from rlhf_engine.config import OptimConfig


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
