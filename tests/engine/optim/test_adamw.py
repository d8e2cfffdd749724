"""AdamW against the update rules of its two papers."""

import pytest
import torch
from torch import nn

from rlhf_engine.config import OptimConfig
from rlhf_engine.optim.adamw import optimizer_step
from rlhf_engine.optim.build import build_optimizer


@pytest.mark.parametrize("form", ["corrected", "raw"])
def test_s10_epsilon_is_added_before_or_after_the_bias_correction(form):
    """Three steps by hand, in float64, with an epsilon as large as the gradients."""
    config = OptimConfig(lr=0.1, eps=0.5, eps_form=form, max_grad_norm=None)
    layer = nn.Linear(3, 2).double()
    optimizer = build_optimizer(layer, config)
    generator = torch.Generator().manual_seed(0)
    expected = {p: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in layer.parameters()}
    for t in range(1, 4):
        for parameter, (weight, m, v) in expected.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            m.mul_(0.9).add_(0.1 * parameter.grad)
            v.mul_(0.95).add_(0.05 * parameter.grad**2)
            correction = 1 - 0.95**t
            if form == "corrected":
                weight -= 0.1 * (m / (1 - 0.9**t)) / ((v / correction).sqrt() + 0.5)
            else:
                weight -= 0.1 * correction**0.5 / (1 - 0.9**t) * m / (v.sqrt() + 0.5)
        optimizer_step(optimizer, config, t - 1, 3)
    for parameter, (weight, *_) in expected.items():
        torch.testing.assert_close(parameter.detach(), weight.detach(), rtol=1e-9, atol=1e-12)
