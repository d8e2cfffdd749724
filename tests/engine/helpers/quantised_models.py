"""Tiny models with quantised layers, loaded from a folder as a run loads them."""

import torch
from transformers import AutoModelForCausalLM

from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.pretrained import load_pretrained
from rlhf_engine.model.quantised import QuantisedLinear
from tests.engine.helpers.adapted_models import SETTINGS, moved
from tests.engine.helpers.tiny_models import tiny

QUANTS = ("int8", "nf4", "fp8")


def quantised(folder, quant, family="llama", *, dtype=torch.float32, **changes):
    """Return a tiny model whose layers are quantised; its weights are written to `folder` first."""
    tiny(family, initializer_range=0.1, **changes).save_pretrained(folder)
    return load_pretrained(AutoModelForCausalLM, folder, quant=quant, dtype=dtype)


def with_adapter(folder, quant, family="llama", *, change=True, **settings):
    """Return a quantised model and its adapters, of which the policy's changes the model if `change` is set."""
    model = quantised(folder, quant, family, **settings)
    adapters = Adapters.start(model, SETTINGS, 0, folder)
    if change:
        moved(adapters)
    return model, adapters


def layers(model):
    """Return the quantised layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}
