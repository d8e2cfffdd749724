"""Exponential moving average of the weights, often a better policy than the weights themselves (InstructGPT: decay 0.992)."""

from __future__ import annotations

import torch

from rlhf_engine.model import ActorCritic, frozen_copy

AVERAGE_DTYPE = torch.float32
"""Dtype of the average. Half precision would round away its updates, which are 1 - decay times a difference."""


class WeightAverage:
    """`average <- decay * average + (1 - decay) * weights` after every optimizer step, starting from the initial weights.

    It needs the memory of a second copy of the weights, in float32 for weights of any dtype; with adapters or trained top
    layers, of theirs only.
    """

    def __init__(self, policy: ActorCritic, decay: float) -> None:
        self.decay, self.policy = decay, policy
        self.model = frozen_copy(policy)
        if policy.adapters is None and policy.top is None:
            self.model.to(AVERAGE_DTYPE)
        for _, average in self.model.stored():  # frozen weights are shared with the policy, so they keep their dtype
            average.data = average.data.to(AVERAGE_DTYPE)
        theirs = dict(policy.named_parameters())
        self.pairs = [(average, theirs[name]) for name, average in self.model.stored()]

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the policy's current weights."""
        for average, weight in self.pairs:
            average.lerp_(weight.float(), 1.0 - self.decay)
