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
    """Peak learning rate; AdamW moves a weight by about this much a step."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and second moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    eps_form: Literal["corrected", "raw"] = "corrected"
    """Whether that moment has its bias correction already (the Adam paper's algorithm and PyTorch) or not yet (TensorFlow, so
    OpenAI 2019), which makes epsilon larger and the first steps smaller."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) are never decayed."""
    warmup_steps: WholeNumber = 0
    """Optimiser steps over which the learning rate climbs linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up, down to `final_lr_share` at the last step."""
    final_lr_share: Share = 0.1
    """Share of `lr` left at the last step of a linear or cosine schedule."""
    max_grad_norm: Positive | None = 1.0
    """Global gradient norm above which gradients are scaled down; None leaves them alone."""
