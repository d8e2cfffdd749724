"""Settings of AdamW and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine.config.schema import (
    LearningRate,
    NonNegative,
    Positive,
    Section,
    Share,
    WholeNumber,
)


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: LearningRate = 1e-5
    """Peak learning rate; AdamW changes a weight by about this much per step."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: Positive = 1e-8
    """Added to the square root of the second moment in the denominator of the step."""
    eps_form: Literal["corrected", "raw"] = "corrected"
    """Second moment to which eps is added: with bias correction (corrected, as in the Adam paper's algorithm and
    PyTorch) or without (raw, as in TensorFlow and so OpenAI 2019), which gives eps more weight and makes the first
    steps smaller."""
    weight_decay: NonNegative = 0.0
    """Coefficient of decoupled weight decay on matrices; vectors (norms, biases) are never decayed."""
    warmup_steps: WholeNumber = 0
    """Optimizer steps over which the learning rate rises linearly to `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling along a line or half a cosine to `final_lr_share` at the
    last step."""
    final_lr_share: Share = 0.1
    """Learning rate at the last step of a linear or cosine schedule, as a fraction of `lr`."""
    max_grad_norm: Positive | None = 1.0
    """Maximum global norm of the gradients; larger gradients are scaled down to it. If None, gradients are not
    clipped."""
