# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# The attributes of layers of bitsandbytes and torchao, which this module does not import.
"""The output layer of a Hugging Face causal LM: its weight and bias, and how the model transforms its result.

Legend: B sequences, T positions, K tokens to score, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any, Protocol, TypedDict, cast

import torch
from torch import Tensor, nn

from .launch_args import TokenLogprobs, Transform
from .ops.weights import QuantisedWeight


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
    check_symmetric(layer)
    if not transforms_alike(model, layer, transform):
        raise ValueError(why_unlike(transform))
    return {"weight": stored_weight(layer), "bias": layer.bias, **transform}


_LARGEST_NUMBER = 1e30
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of configs for the softcap of the logits."""


def transform_of(model: nn.Module) -> HeadTransform:
    """Return the softcap and the logit scale in a Hugging Face model's config.

    `final_logit_softcapping` (Gemma), `logits_soft_cap` (RecurrentGemma) and `output_logit_soft_cap` (xLSTM) are softcaps.
    `logit_scale` (Cohere) and `lm_head_multiplier` (Falcon-H1) multiply the logits, `logits_scaling` divides them (Granite)
    or multiplies them (HyperCLOVA X).
    """
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= _number_of(model, name) or 1.0
    scaling = _number_of(model, "logits_scaling") or 1.0
    scale *= scaling if getattr(_text_config(model), "model_type", None) == "hyperclovax" else 1 / scaling
    softcaps = (_number_of(model, name) for name in _SOFTCAPS)
    return {"softcap": next((value for value in softcaps if value is not None), None), "logit_scale": scale}


def _text_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    return config if text_config is None else text_config()


def _number_of(model: nn.Module, name: str) -> float | None:
    """Return a number in a model's config; None if it has none."""
    value = getattr(_text_config(model), name, None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST_NUMBER:
        place = getattr(model, "name_or_path", "") or "model"
        raise ValueError(f"{place}: {name} in its config: got {str(value)[:100]!r}, expected a finite number")
    return float(value)


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


# ---- quantised layers ----


def is_lora(layer: nn.Module) -> bool:
    """Return whether `layer` is a LoRA layer around a linear layer."""
    return hasattr(layer, "lora_A") and hasattr(layer, "base_layer")


def is_wrapper(layer: nn.Module) -> bool:
    """Return whether `layer` is peft's wrapper of a linear layer under `modules_to_save` or `trainable_token_indices`."""
    trained = hasattr(layer, "modules_to_save") or hasattr(layer, "token_adapter")
    return trained and isinstance(getattr(layer, "original_module", None), nn.Linear)


def is_quantised(layer: Any) -> bool:
    """Return whether the weight of a linear layer is not stored in floating point."""
    weight = layer.weight
    return (
        getattr(weight, "quant_state", None) is not None or hasattr(weight, "qdata") or not weight.is_floating_point()
    )


def whole(weight: Tensor) -> Tensor:
    """Return `weight`; raise ValueError if it is sharded."""
    if hasattr(weight, "placements") or not weight.numel():
        raise ValueError(
            "head: got a sharded weight; run the head inside the model's forward, which gathers the weight"
        )
    return weight


def applies_adapters(adapter: Any) -> bool:
    """Return whether active adapters have to be added to the weight."""
    if adapter.disable_adapters and adapter.merged:
        raise ValueError("head: the adapters are merged and disabled; unmerge them first")
    return not (adapter.disable_adapters or adapter.merged)


def saved_layer(wrapper: Any) -> nn.Module:
    """Return the layer that a wrapper under `modules_to_save` uses: the active adapter's copy, or the original."""
    names = wrapper.active_adapters
    if wrapper.disable_adapters or not names or any(name not in wrapper.modules_to_save for name in names):
        return wrapper.original_module
    return wrapper.modules_to_save[names[0]]


def stored_weight(layer: Any) -> Tensor | QuantisedWeight:
    """Return the weight of a linear layer: the parameter, or the 4-bit weight of bitsandbytes or the int8 one of torchao.

    Raises:
        ValueError: the weight is quantised in a different way.
    """
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return _of_bitsandbytes(weight, state)
    if hasattr(weight, "qdata"):
        return _of_torchao(weight)
    if not weight.is_floating_point():
        raise _unknown(f"{type(layer).__name__} with a weight of {weight.dtype}")
    return weight


def _unknown(got: str) -> ValueError:
    return ValueError(
        f"head: got {got}, expected a floating point weight, NF4 of bitsandbytes, or int8 weights of torchao with one scale "
        "per row; leave the output layer out of the quantisation"
    )


def _of_bitsandbytes(weight: Any, state: Any) -> QuantisedWeight:
    """Return the weight of a `Linear4bit`: two codes per byte in row-major order, with one absmax per block.

    With nested statistics, `absmax` holds codes of a second quantisation.
    """
    if state.quant_type != "nf4":
        raise _unknown(f"bitsandbytes' {state.quant_type!r}")
    packed, absmax, (v, h) = weight.data.reshape(-1).view(torch.uint8), state.absmax, state.shape
    if state.nested:
        second = state.state2
        scales = second.absmax.repeat_interleave(second.blocksize)[: absmax.numel()]
        absmax = second.code.index_select(0, absmax.int()) * scales + state.offset
    if getattr(state, "packing_format_for_cpu", False):
        packed, absmax = _row_major(packed, v, h), absmax.t().reshape(-1)
    return QuantisedWeight.nf4(packed, absmax, v, h, block=state.blocksize)


def _row_major(packed: Tensor, v: int, h: int) -> Tensor:
    """Return the codes in row-major order from the layout of bitsandbytes for CPUs with AVX512-BF16.

    There, 32 rows are stored together: for each pair of columns, 32 bytes whose low halves are the codes of the first 16
    rows and whose high halves are those of the last 16.
    """
    columns = packed.view(v // 32, h // 2, 32)
    codes = torch.cat((columns & 15, columns >> 4), -1).view(v // 32, h // 2, 32, 2)
    return (codes[..., 0] << 4 | codes[..., 1]).transpose(1, 2).reshape(-1)


def _of_torchao(weight: Any) -> QuantisedWeight:
    """Return the weight of torchao's `Int8WeightOnlyConfig`, with one scale per row."""
    values, scale = weight.qdata, weight.scale
    if values.dtype != torch.int8 or values.dim() != 2 or scale.numel() != len(values):
        raise _unknown(f"{type(weight).__name__} with {values.dtype} and scales of shape {tuple(scale.shape)}")
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        raise _unknown(f"{type(weight).__name__} that quantises or scales its input")
    return QuantisedWeight.int8(values, scale.reshape(-1))


def check_symmetric(layer: Any) -> None:
    """Raise ValueError for an int8 weight of torchao with zero points. This reads the tensor's values."""
    zero = getattr(getattr(layer, "weight", None), "zero_point", None)
    if zero is not None and bool(zero.any()):
        raise _unknown("an int8 weight with zero points")


# ---- tokens that a model scores in its forward ----


class WantedTokens:
    """The tokens whose log-probs a model's forward returns instead of logits; `head` is the model's `FusedHead`."""

    def __init__(self, head: Any, ids: Tensor, temperature: float, mask: Tensor | None, shifted: bool):
        self.head: Any = head
        self.ids: Tensor = ids
        self.temperature: float = temperature
        self.mask: Tensor | None = mask
        self.shifted: bool = shifted
        self.values: Tensor | None = None  # (B, K, 2), detached

    def outputs(self, hidden: Tensor) -> Tensor:  # (B, T, H) -> (B, K, 2)
        """Return log-probs and entropies, or zeros with their gradient if the model transforms its logits.

        The model's transform f has f(0) = 0 and f'(0) = logit_scale. Its effect on zeros is therefore known, and
        `result` reverts it.
        """
        k, t = self.ids.shape[1], hidden.shape[1]
        if k > t - (not self.shifted):
            raise ValueError(
                f"ids: got {k} tokens for {t} positions, expected fewer: the state at a position predicts the token after it"
            )
        hidden = hidden[:, t - k :] if self.shifted else hidden[:, t - k - 1 : t - 1]
        taken = self.head.logprobs(hidden, self.ids, temperature=self.temperature, mask=self.mask, entropy=True)
        assert taken.entropy is not None
        exact = torch.stack((taken.logprobs, taken.entropy), -1)
        if not self._transformed():
            return exact
        self.values = exact.detach()
        return exact - self.values

    def result(self, logits: Tensor) -> TokenLogprobs:  # (B, K, 2)
        """Return log-probs and entropies (B, K) from the `logits` that the model returned."""
        if self._transformed():
            if self.values is None:
                raise RuntimeError("taking: the head has not run; call the model once inside the `taking` context")
            logits = self.values + logits / self.head.logit_scale
        return TokenLogprobs(*logits.unbind(-1))

    def _transformed(self) -> bool:
        return self.head.softcap is not None or self.head.logit_scale != 1.0
