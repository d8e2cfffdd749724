"""An exponential moving average of the weights, which is often the better policy (InstructGPT's has decay 0.992)."""

from __future__ import annotations

import torch

from rlhf_engine.model import ActorCritic, frozen_copy

AVERAGE_DTYPE = torch.float32
"""Type of the average, in which 1 - decay of a weight is not lost."""


class WeightAverage:
    """`average <- decay * average + (1 - decay) * weights` after every optimiser step, from the first weights on.

    Costs the weights once more, in float32 whatever they are in, where 1 - decay of a weight is not lost.
    """

    def __init__(self, policy: ActorCritic, decay: float) -> None:
        self.decay, self.policy = decay, policy
        self.model = frozen_copy(policy).to(AVERAGE_DTYPE)
        theirs = dict(policy.named_parameters())
        names = [name for name, _ in self.model.named_parameters()]
        self.pairs = [(self.model.get_parameter(name), theirs[name]) for name in names]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the policy's weights as they are now."""
        for average, weight in self.pairs:
            average.lerp_(weight.float(), 1.0 - self.decay)
