# pyright: reportUnknownMemberType=false
# torch does not declare the types of the hooks of a state dict.
"""The output layer of a language model from hidden states: logits, log-probs and the PPO loss, without [N, V] logits.

Legend: B sequences, T positions, N tokens, K tokens to score, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._options import PPOOptions
from .launch_args import PPOLoss, TokenLogprobs
from .ops import checks, linear_ppo_loss, linear_token_logprobs


class Matrices(NamedTuple):
    """What the head multiplies: `hidden @ weight.T + bias`."""

    hidden: Tensor  # (..., H + R); R is the rank of all active adapters
    weight: Tensor  # (V, H + R)
    bias: Tensor | None  # (V,)


class HeadTransform(TypedDict):
    """What a model does to the product of its output layer: softcap and logit scale of `FusedHead`."""

    softcap: float | None
    logit_scale: float


class CausalLM(Protocol):
    """What a Hugging Face causal LM has besides `torch.nn.Module`."""

    def get_output_embeddings(self) -> nn.Module: ...

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None: ...


class FusedHead(nn.Module):
    """An output layer `softcap * tanh(logit_scale * (h W^T + b) / softcap)` around a linear layer.

    `layer` is a `torch.nn.Linear`, or peft's LoRA layer around one. Every call reads weights and adapters from it, so that
    FSDP2's gathered weights and a switched adapter are seen. The layer is a submodule. A model that registers
    the layer itself keeps the head in a plain attribute (`model.__dict__`), so that no parameter is registered twice.

    Of a LoRA layer the active adapters count, with their dropout and scale; variants (DoRA, a bias in B) are refused.
    `FusedHead.replacing(layer)` is the layer's substitute inside a model; `integrations.head.fuse_head` installs it.
    """

    layer: nn.Module | None
    weight: Tensor  # of a head without `layer`
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    backend: str

    def __init__(
        self, layer: nn.Module, *, softcap: float | None = None, logit_scale: float = 1.0, backend: str = "auto"
    ):
        super().__init__()
        if not isinstance(layer, nn.Linear) and not _is_lora(layer):
            raise ValueError(
                f"layer: got {type(layer).__name__}, expected torch.nn.Linear or peft's LoRA layer around one"
            )
        checks.number("softcap", softcap, above=0, optional=True)
        checks.number("logit_scale", logit_scale, above=0)
        self.layer = layer
        self.softcap, self.logit_scale, self.backend = softcap, logit_scale, backend
        self._wanted: _Wanted | None = None
        self.register_state_dict_post_hook(_without_layer)
        self.register_load_state_dict_pre_hook(_with_layer)

    @classmethod
    def of(cls, model: nn.Module, *, backend: str = "auto") -> FusedHead:
        """Return the head of a Hugging Face causal LM, with the softcap and logit scale of its config."""
        return cls(cast(CausalLM, model).get_output_embeddings(), **transform_of(model), backend=backend)

    @classmethod
    def replacing(
        cls, layer: nn.Module, *, softcap: float | None = None, logit_scale: float = 1.0, backend: str = "auto"
    ) -> FusedHead:
        """Return a head that has the parameters of a linear layer under their names, to replace it in a model.

        Its `forward` is the layer's outside `taking`: the model applies softcap and scale.
        """
        head = cls(layer, softcap=softcap, logit_scale=logit_scale, backend=backend)
        if isinstance(layer, nn.Linear):
            head.layer = None
            head.weight, head.bias = layer.weight, layer.bias
        return head

    def logits(self, hidden: Tensor) -> Tensor:  # (..., H) -> (..., V)
        """Return the logits of a few rows, for sampling."""
        return self.transform(self._product(hidden))

    def transform(self, product: Tensor) -> Tensor:  # (..., V) -> (..., V)
        """Return `softcap * tanh(logit_scale * product / softcap)`."""
        if self.logit_scale != 1.0:
            product = product * self.logit_scale
        return product if self.softcap is None else self.softcap * torch.tanh(product / self.softcap)

    def logprobs(
        self,
        hidden: Tensor,  # (..., H)
        ids: Tensor,  # (...)
        *,
        temperature: float | Tensor = 1.0,
        mask: Tensor | None = None,  # (...), bool
        entropy: bool = False,
        chunk_tokens: int | None = None,
    ) -> TokenLogprobs:
        """Return the log-probs of `ids`, and the entropy on request; see `linear_token_logprobs`."""
        hidden, weight, bias = self.matrices(hidden)
        return linear_token_logprobs(
            hidden,
            weight,
            ids,
            bias=bias,
            temperature=temperature,
            mask=mask,
            entropy=entropy,
            chunk_tokens=chunk_tokens,
            **self._options(),
        )

    def ppo_loss(
        self,
        hidden: Tensor,  # (B, T, H) or (N, H)
        ids: Tensor,  # (B, T) or (N,)
        old_logprobs: Tensor,  # (B, T) or (N,)
        advantages: Tensor,  # (B, T) or (N,)
        mask: Tensor,  # (B, T) or (N,), bool
        *,
        value_weight: Tensor | None = None,  # (H,)
        value_bias: Tensor | None = None,  # ()
        temperature: float | Tensor = 1.0,
        chunk_tokens: int | None = None,
        compact: bool | None = None,
        **options: Unpack[PPOOptions],
    ) -> PPOLoss:
        """Return the PPO loss of policy and value head from one read of `hidden`; see `linear_ppo_loss`."""
        width = hidden.shape[-1]
        hidden, weight, bias = self.matrices(hidden)
        added = hidden.shape[-1] - width
        if value_weight is not None and added:
            value_weight = torch.cat([value_weight, value_weight.new_zeros(added)])  # adapters of the head add no value
        return linear_ppo_loss(
            hidden,
            weight,
            ids,
            old_logprobs,
            advantages,
            mask,
            bias=bias,
            value_weight=value_weight,
            value_bias=value_bias,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            compact=compact,
            **self._options(),
            **options,
        )

    def matrices(self, hidden: Tensor) -> Matrices:  # (..., H)
        """Return `[h, s A h]` and `[W, B]`, whose product is `W h + s B A h`: no [N, V] tensor for an adapter either.

        Raises:
            ValueError: sharded weights, adapters that are merged and disabled, a variant of LoRA.
        """
        layer: Any = self if self.layer is None else self.layer  # peft's attributes, which a module does not declare
        if not _is_lora(layer):
            return Matrices(hidden, _whole(layer.weight), layer.bias)
        base = layer.base_layer
        return Matrices(*_widened(layer, hidden, _whole(base.weight)), base.bias)

    @contextmanager
    def taking(
        self, ids: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None, shifted: bool = False
    ) -> Generator[_Wanted, None, None]:
        """Within the context, the model around a `replacing` head returns (B, K, 2) instead of logits.

        `taken.result(output.logits)` turns it into log-probs and entropy of `ids` (B, K), the last K tokens of the model's
        input. They leave through the model's outputs, where FSDP2 and ZeRO-3 attach hooks to what needs a gradient. The
        model must compute K + 1 positions or more (`logits_to_keep`). `shifted`: K positions, `ids` being the tokens that
        follow them. Where `mask` is False both are 0.
        """
        if self._wanted is not None:
            raise RuntimeError("taking: the head takes other tokens already")
        self._wanted = _Wanted(self, ids, temperature, mask, shifted)
        try:
            yield self._wanted
        finally:
            self._wanted = None

    def forward(self, hidden: Tensor) -> Tensor:  # (B, T, H)
        return self._product(hidden) if self._wanted is None else self._wanted.outputs(hidden)

    def _product(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias) if self.layer is None else self.layer(hidden)

    def _options(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "logit_scale": self.logit_scale, "backend": self.backend}


def transform_of(model: nn.Module) -> HeadTransform:
    """Return softcap and logit scale under the names of the Hugging Face families.

    `final_logit_softcapping` (Gemma) caps, `logit_scale` (Cohere) and `lm_head_multiplier` (Falcon-H1) multiply,
    `logits_scaling` (Granite) divides.
    """
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    config = config if text_config is None else text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return {"softcap": None if softcap is None else float(softcap), "logit_scale": scale}


class _Wanted:
    """The tokens that a model's forward scores instead of computing logits, and their log-probs."""

    def __init__(self, head: FusedHead, ids: Tensor, temperature: float, mask: Tensor | None, shifted: bool):
        self.head, self.ids, self.temperature, self.mask, self.shifted = head, ids, temperature, mask, shifted
        self.values: Tensor | None = None  # (B, K, 2), detached

    def outputs(self, hidden: Tensor) -> Tensor:  # (B, T, H) -> (B, K, 2)
        """Return log-probs and entropies, or, for a model that transforms its logits, zeros with their gradient.

        The model's transform f has f(0) = 0 and f'(0) = logit_scale, so that it changes zeros in a known way.
        """
        k, t = self.ids.shape[1], hidden.shape[1]
        if k > t - (not self.shifted):
            raise ValueError(f"ids: got {k} tokens of {t} positions, expected fewer: row t is the state before token t")
        hidden = hidden[:, t - k :] if self.shifted else hidden[:, t - k - 1 : t - 1]
        taken = self.head.logprobs(hidden, self.ids, temperature=self.temperature, mask=self.mask, entropy=True)
        assert taken.entropy is not None
        exact = torch.stack((taken.logprobs, taken.entropy), -1)
        if not self._transformed():
            return exact
        self.values = exact.detach()
        return exact - self.values

    def result(self, logits: Tensor) -> TokenLogprobs:  # (B, K, 2)
        """Return log-probs and entropies (B, K) from what the model returned as logits."""
        if self._transformed():
            if self.values is None:
                raise RuntimeError("taking: the head did not run, expected one forward of the model")
            logits = self.values + logits / self.head.logit_scale
        return TokenLogprobs(*logits.unbind(-1))

    def _transformed(self) -> bool:
        return self.head.softcap is not None or self.head.logit_scale != 1.0


def _is_lora(layer: nn.Module) -> bool:
    return hasattr(layer, "lora_A") and hasattr(layer, "base_layer")


def _whole(weight: Tensor) -> Tensor:
    """Return a weight that is not sharded."""
    if hasattr(weight, "placements") or not weight.numel():
        raise ValueError("head: got a sharded weight, expected the head to run inside the forward that gathers it")
    return weight


def _widened(layer: Any, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            raise ValueError("head: got merged adapters that are disabled, expected them unmerged first")
        return hidden, weight
    columns, rows = [hidden], [weight]
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b = layer.lora_A[name], layer.lora_B[name]
        if getattr(layer, "lora_variant", {}).get(name) is not None or b.bias is not None:
            raise ValueError(f"head: got a variant of LoRA in adapter {name!r}, expected plain A and B without a bias")
        low = a(layer.lora_dropout[name](hidden.to(a.weight.dtype))) * layer.scaling[name]
        columns.append(low.to(hidden.dtype))
        rows.append(_whole(b.weight).to(weight.dtype))
    return torch.cat(columns, -1), torch.cat(rows, 1)


def _without_layer(module: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Name the layer's parameters as the layer does."""
    for key in [k for k in state if k.startswith(f"{prefix}layer.")]:
        state[prefix + key.removeprefix(f"{prefix}layer.")] = state.pop(key)


def _with_layer(module: FusedHead, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The inverse of `_without_layer`."""
    for key in [k for k in state if k.startswith(prefix)] if module.layer is not None else ():
        state[f"{prefix}layer.{key.removeprefix(prefix)}"] = state.pop(key)
