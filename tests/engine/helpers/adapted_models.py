"""Tiny models with adapters of several roles."""

import torch

from rlhf_engine.config import AdapterConfig
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.roles import POLICY
from tests.engine.helpers.tiny_models import tiny

SETTINGS = AdapterConfig(rank=4, alpha=8.0)


def moved(adapters, name=POLICY, seed=0, scale=0.1):
    """Set the matrices B of an adapter to random numbers, so that it changes the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in adapters.tensors(name).items():
            if "lora_B" in key:
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))


def adapted(family="llama", *, change=True, settings=SETTINGS, dtype=torch.float32):
    """Return a tiny model and its adapters, of which the policy's changes the model if `change` is set."""
    model = tiny(family, initializer_range=0.1).to(dtype)
    adapters = Adapters.start(model, settings, seed=0)
    if change:
        moved(adapters)
    return model, adapters
