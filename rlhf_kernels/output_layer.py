"""The output layer of a Hugging Face causal LM: its weight and bias, and how the model transforms its result.

Legend: V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any, Protocol, TypedDict, cast

import torch
from torch import Tensor, nn

from .launch_args import Transform
from .operands import stored_weight
from .ops.quantised_weight import QuantisedWeight


class HeadTransform(TypedDict):
    """The softcap and the logit scale that a model applies to the result of its output layer."""

    softcap: float | None
    logit_scale: float


class HeadArguments(HeadTransform):
    """The arguments of `linear_ppo_loss` and `linear_token_logprobs` that describe a model's output layer."""

    weight: Tensor | QuantisedWeight  # (V, H)
    bias: Tensor | None  # (V,)


class CausalLM(Protocol):
    """The methods of a Hugging Face causal LM that are used here and that `torch.nn.Module` does not have."""

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        ...

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output layer."""
        ...


def head_arguments(model: nn.Module) -> HeadArguments:
    """Return weight, bias, softcap and logit scale of a Hugging Face causal LM's output layer.

        head = head_arguments(model)  # once
        hidden = model.base_model(input_ids=ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
        loss, metrics = linear_ppo_loss(hidden, ids=ids[:, 1:], ..., **head)

    Softcap and scale are read from the config. The function runs the model on two tokens to check that its logits are
    `softcap * tanh(logit_scale * (h W^T + b) / softcap)` with these values. Weight and bias are the model's parameters,
    or a `QuantisedWeight` for an output layer of bitsandbytes (NF4) or torchao (int8).

    Raises:
        ValueError: the logits are different ones, or the output layer has adapters, whose product needs other hidden
            states; `FusedHead.of(model)` supports adapters.
    """
    layer, transform = cast(CausalLM, model).get_output_embeddings(), transform_of(model)
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"model: its output layer is {type(layer).__name__}, expected torch.nn.Linear; use FusedHead.of(model), which "
            "applies adapters"
        )
    if not transforms_alike(model, layer, transform):
        raise ValueError(why_unlike(transform))
    return {"weight": stored_weight(layer), "bias": layer.bias, **transform}


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of configs for the softcap of the logits."""


def transform_of(model: nn.Module) -> HeadTransform:
    """Return the softcap and the logit scale in a Hugging Face model's config.

    `final_logit_softcapping` (Gemma), `logits_soft_cap` (RecurrentGemma) and `output_logit_soft_cap` (xLSTM) are softcaps.
    `logit_scale` (Cohere) and `lm_head_multiplier` (Falcon-H1) multiply the logits, `logits_scaling` divides them (Granite)
    or multiplies them (HyperCLOVA X).
    """
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    config = config if text_config is None else text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= scaling if getattr(config, "model_type", None) == "hyperclovax" else 1 / scaling
    softcaps = (getattr(config, name, None) for name in _SOFTCAPS)
    softcap = next((value for value in softcaps if value is not None), None)
    return {"softcap": None if softcap is None else float(softcap), "logit_scale": scale}


def why_unlike(transform: HeadTransform) -> str:
    """Return the message for a model that does not transform its logits as in its config."""
    return (
        f"model: the logits are not those of the output layer with softcap={transform['softcap']} and "
        f"logit_scale={transform['logit_scale']}, which are in the config; a different transform of the logits is not supported"
    )


LARGEST = 100.0
"""Largest logit of the probe in `transforms_alike`, large enough to reveal any softcap."""


@torch.no_grad()
def transforms_alike(model: nn.Module, layer: nn.Module, transform: HeadTransform) -> bool:
    """Return whether the model transforms a probe, in place of the layer's output, as `Transform.capped` does.

    The model runs on two tokens, in evaluation mode.
    """
    calls: list[Tensor] = []

    def probe(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        calls.append(torch.linspace(-LARGEST, LARGEST, output.shape[-1], device=output.device).to(output.dtype))
        return calls[-1].expand_as(output)

    hook = layer.register_forward_hook(probe)
    training = model.training
    model.eval()
    try:
        seen = run_two_tokens(model, layer).float()
    finally:
        hook.remove()
        model.train(training)
    if len(calls) != 1:
        return False
    expected = Transform.of(**transform).capped(calls[0].float())
    eps = torch.finfo(calls[0].dtype).eps
    # The model may round to its dtype after each of its three operations.
    return seen.shape[-1] == len(expected) and torch.allclose(
        seen, expected.expand_as(seen), rtol=4 * eps, atol=4 * eps
    )


def run_two_tokens(model: nn.Module, layer: nn.Module) -> Tensor:
    """Return the model's logits of two tokens, on the device of its output layer."""
    ids = torch.tensor([[0, 1]], device=next(layer.parameters()).device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
