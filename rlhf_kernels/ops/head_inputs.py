"""The inputs of the fused head: the low-rank term, their checks, and their record as arguments of registered ops.

Legend: N tokens, V vocabulary, H hidden, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .products import Head
from .quantised_weight import QuantisedWeight


class LowRank(NamedTuple):
    """A low-rank term of the logits, such as an adapter on the output layer: `logits += states @ weight.T`.

    For LoRA, `W + scale * B A` is the weight of the layer, `states = scale * hidden @ A.T` and `weight = B`; `LowRank.lora`
    computes the states. No tensor of the size of W is needed. Several adapters are one term: concatenate states and
    weights along R.
    """

    states: Tensor  # (..., R), differentiable
    weight: Tensor  # (V, R), differentiable

    @classmethod
    def lora(
        cls,
        hidden: Tensor,  # (..., H), differentiable
        lora_a: Tensor,  # (R, H), differentiable
        lora_b: Tensor,  # (V, R), differentiable
        scale: float = 1.0,
        *,
        mask: Tensor | None = None,  # (...), bool
    ) -> "LowRank":
        """Return the term of the LoRA adapter `W + scale * B A` (Hu et al. 2021, eq. 3).

        Hidden states may be NaN where `mask` is False. The states have the dtype of `hidden`.

        Raises:
            ValueError: a shape, dtype or device that does not fit.
        """
        checks.floating("hidden", hidden, dims=tuple(range(1, 8)), what="[..., H]")
        checks.floating("lora_a", lora_a, dims=(2,), what="[R, H]")
        rank = lora_a.shape[0]
        checks.tensor("lora_a", lora_a, like=hidden, expected=(rank, hidden.shape[-1]), what="[R, H]")
        checks.floating("lora_b", lora_b, dims=(2,), what="[V, R]")
        checks.tensor("lora_b", lora_b, like=hidden, expected=(lora_b.shape[0], rank), what="[V, R]")
        checks.number("scale", scale)
        states = F.linear(unmasked(hidden, mask).to(lora_a.dtype), lora_a) * scale
        return cls(states.to(hidden.dtype), lora_b.to(hidden.dtype))


def unmasked(hidden: Tensor, mask: Tensor | None) -> Tensor:  # (..., H)
    """Return the hidden states with zeros where the mask (...) is False, so that NaN there reaches no gradient."""
    if mask is None:
        return hidden
    checks.mask("mask", mask, like=hidden, expected=hidden.shape[:-1], what="the shape of ids")
    return torch.where(mask[..., None], hidden, 0)


def under_autocast(
    hidden: Tensor, weight: Tensor | QuantisedWeight, bias: Tensor | None, low_rank: LowRank | None
) -> tuple[Tensor, Tensor | QuantisedWeight, Tensor | None, LowRank | None]:
    """Return the head's inputs in autocast's dtype if autocast is enabled, as `torch.nn.functional.linear` does.

    float64 stays float64, and a quantised weight is not changed.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias, low_rank
    dtype = torch.get_autocast_dtype(device)
    return (
        hidden.to(dtype),
        weight.to(dtype) if isinstance(weight, Tensor) else weight,
        None if bias is None else bias.to(dtype),
        None if low_rank is None else LowRank(low_rank[0].to(dtype), low_rank[1].to(dtype)),
    )


def check_head(
    hidden: Tensor,
    weight: Tensor | QuantisedWeight,
    ids: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None,
    chunk_tokens: int | None,
) -> None:
    """Check the arguments of `linear_token_logprobs`, which `linear_ppo_loss` also has."""
    checks.floating("hidden", hidden, dims=tuple(range(1, 8)), what="[..., H]")
    rows = hidden.shape[:-1]
    v = _check_weight(weight, hidden)
    if bias is not None:
        checks.tensor("bias", bias, like=hidden, expected=(v,), what="[V]", dtypes=(hidden.dtype,))
    if low_rank is not None:
        _check_low_rank(low_rank, hidden, v)
    if mask is not None:
        checks.mask("mask", mask, like=hidden, expected=rows, what="the shape of ids")
    checks.ids(ids, like=hidden, expected=rows, vocabulary=v, where=mask)
    checks.temperature(temperature, like=hidden, expected=rows)
    checks.number("softcap", softcap, above=0, optional=True)
    checks.number("logit_scale", logit_scale, above=0)
    checks.number("chunk_tokens", chunk_tokens, least=1, optional=True, integer=True)


def _check_weight(weight: Tensor | QuantisedWeight, hidden: Tensor) -> int:
    """Check the weight, and return the size of the vocabulary."""
    h = hidden.shape[-1]
    if isinstance(weight, QuantisedWeight):
        if weight.shape[1] != h:
            raise ValueError(f"weight: got shape {weight.shape}, expected {(len(weight), h)} = [V, H]")
        if weight.device != hidden.device:
            raise ValueError(f"weight: got device {weight.device}, expected {hidden.device}")
        return len(weight)
    checks.floating("weight", weight, dims=(2,), what="[V, H]")
    v = weight.shape[0]
    checks.tensor("weight", weight, like=hidden, expected=(v, h), what="[V, H]", dtypes=(hidden.dtype,))
    if v == 0 or h == 0:
        raise ValueError(f"weight: got shape {checks.shape(weight)}, expected V >= 1 and H >= 1")
    return v


def _check_low_rank(low_rank: LowRank, hidden: Tensor, v: int) -> None:
    if not isinstance(low_rank, tuple) or len(low_rank) != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"low_rank: got {type(low_rank).__name__}, expected LowRank(states, weight)")
    states, weight = low_rank
    checks.floating("low_rank.weight", weight, dims=(2,), what="[V, R]")
    r, dtypes = weight.shape[1], (hidden.dtype,)
    checks.tensor("low_rank.weight", weight, like=hidden, expected=(v, r), what="[V, R]", dtypes=dtypes)
    if r == 0:
        raise ValueError(f"low_rank.weight: got shape {checks.shape(weight)}, expected R >= 1")
    expected = (*hidden.shape[:-1], r)
    checks.tensor("low_rank.states", states, like=hidden, expected=expected, what="[..., R]", dtypes=dtypes)


class HeadInputs(NamedTuple):
    """The inputs of the head that can need a gradient, flat."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), or the values of a quantised weight
    bias: Tensor | None  # (V,)
    states: Tensor | None  # (N, R)
    low_weight: Tensor | None  # (V, R)

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor | QuantisedWeight, bias: Tensor | None, low_rank: LowRank | None
    ) -> "HeadInputs":
        """Return the record of checked arguments."""
        states, low_weight = (None, None) if low_rank is None else low_rank
        return cls(
            hidden.reshape(-1, hidden.shape[-1]),
            weight if isinstance(weight, Tensor) else weight.values,
            bias,
            None if states is None else states.reshape(-1, states.shape[-1]),
            low_weight,
        )


class Storage(NamedTuple):
    """How the weight is stored: the fields of `QuantisedWeight` other than its values, or no scales."""

    vocabulary: int
    scales: Tensor | None  # None: floating point
    block: int

    @classmethod
    def of(cls, weight: Tensor | QuantisedWeight) -> "Storage":
        """Return the storage of `weight`."""
        if isinstance(weight, Tensor):
            return cls(weight.shape[0], None, 0)
        return cls(len(weight), weight.scales, weight.block)

    def head(self, x: HeadInputs) -> Head:
        """Return the head whose weight is stored in this way."""
        weight = x.weight
        if self.scales is not None:
            weight = QuantisedWeight(weight, self.scales, (self.vocabulary, x.hidden.shape[1]), self.block)
        return Head(weight, x.bias, x.low_weight)


def gradient_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the gradient of `x`: `x.grad_dtype` if set, which is not known in a compiled graph."""
    return (x.grad_dtype if checks.is_eager(x) and x.is_leaf else None) or x.dtype


def dense(weight: Tensor | QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight (V, H) as a tensor, for the reference."""
    return weight if isinstance(weight, Tensor) else weight.dequantised(dtype)
