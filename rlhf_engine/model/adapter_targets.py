"""Linear layers of a model that get adapters, selected by the ends of their names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_engine.model.top_layers import in_top


def target_layers(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Return the full names of the linear layers that end in one of `targets`.

    Raises:
        ValueError: a target matches no linear layer, or the output layer shares its weight with the embedding. The message
            lists the names that exist.
    """
    linear = linear_layers(model)
    output = getattr(model.get_output_embeddings(), "base_layer", model.get_output_embeddings())
    if tuple(targets) == ("all-linear",):
        return [name for name, module in linear.items() if module is not output]
    chosen: dict[str, None] = {}
    for target in targets:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"adapter.targets: got {target!r}, which matches no linear layer of {type(model).__name__}; it has "
                f"{', '.join(ends)}"
            )
        chosen |= dict.fromkeys(found)
    tied = output is not None and output.weight is model.get_input_embeddings().weight
    for name in chosen:
        if tied and linear[name] is output:
            raise ValueError(
                f"adapter.targets: got the output layer {name}, which shares its weight with the embedding; leave it out"
            )
    return [name for name in linear if name in chosen]


def top_targets(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Return those names of `target_layers` that are in the trained layers.

    Raises:
        ValueError: as `target_layers`, or a target matches none of them.
    """
    for target in targets:
        if not in_top(model, target_layers(model, (target,))):
            raise ValueError(
                f"adapter.targets: got {target!r}, which matches no layer that model.train_layers leaves trained; raise "
                "model.train_layers, or leave the target out"
            )
    return in_top(model, target_layers(model, targets))


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers by name; one with adapters has the name that it had without."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and ".lora_" not in name:
            found[name.removesuffix(".base_layer")] = module
    return found
