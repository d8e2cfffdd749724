# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of the hooks of a state dict, nor this module those of peft.
"""The output layer of a language model: log-probs and losses from hidden states, without [N, V] logits.

Legend: B sequences, T positions, N tokens, K tokens to score or in a teacher's list, V vocabulary, H hidden, R rank of all
active adapters.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._options import PPOOptions
from .launch_args import PPOLoss, TokenLogprobs, Transform
from .matrices import Matrices, operands
from .ops import checks, linear_ppo_loss, linear_token_logprobs, linear_topk_kl
from .ops.row_terms import tokens_of
from .ops.shards import Group
from .output_layer import (
    CausalLM,
    WantedTokens,
    check_symmetric,
    is_lora,
    is_quantised,
    is_wrapper,
    transform_of,
)
from .token_args import TopkKL


class FusedHead(nn.Module):
    """A wrapper of a linear output layer with the logits `softcap * tanh(logit_scale * (h W^T + b) / softcap)`.

    `layer` is a `torch.nn.Linear`, or peft's layer around one: LoRA, or the wrapper of a layer in `modules_to_save` or
    with `trainable_token_indices`. Every call reads weights and adapters from `layer`, so that it uses the weights that
    FSDP2 has gathered and the adapter that is active at that time. The layer is a submodule of the head. A model that
    registers the layer itself keeps the head in a plain attribute (`model.__dict__`), so that no parameter is registered
    twice.

    The active adapters of a LoRA layer are applied with their dropout and scale, without a copy of the weight. LoRA
    variants (DoRA, a bias in B) raise ValueError. The layer, or the one inside the adapter, may be quantised: NF4 of
    bitsandbytes, or torchao's int8 weights with one scale per row; see `QuantisedWeight`. With `float32=True` the product
    is computed in float32, also under autocast, for half-precision hidden states and weights.
    With `group`, a process group, the rows of the layer's weight are sharded over its ranks: the layer has this rank's rows, or
    its weight is a DTensor; see `linear_token_logprobs`. Such a head computes log-probs and losses, and no logits.
    `FusedHead.replacing(layer)` returns a head that can replace the layer inside a model;
    `integrations.head.fuse_head` installs it.
    """

    layer: nn.Module | None
    weight: Tensor  # (V, H); set only if `layer` is None
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    backend: str
    float32: bool
    group: Group | None

    def __init__(
        self,
        layer: nn.Module,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        backend: str = "auto",
        float32: bool = False,
        group: Group | None = None,  # torch.distributed.ProcessGroup
    ):
        super().__init__()
        if not isinstance(layer, nn.Linear) and not is_lora(layer) and not is_wrapper(layer):
            raise ValueError(f"layer: got {type(layer).__name__}, expected torch.nn.Linear or peft's layer around one")
        checks.number("softcap", softcap, above=0, optional=True)
        checks.number("logit_scale", logit_scale, above=0)
        check_symmetric(getattr(layer, "base_layer", layer))
        self.layer = layer
        self.softcap, self.logit_scale, self.backend, self.float32 = softcap, logit_scale, backend, float32
        self.group = group
        self._wanted: WantedTokens | None = None
        self.register_state_dict_post_hook(_without_layer)
        self.register_load_state_dict_pre_hook(_with_layer)

    @classmethod
    def of(cls, model: nn.Module, *, backend: str = "auto", group: Group | None = None) -> FusedHead:
        """Return the head of a Hugging Face causal LM, with the softcap and logit scale of its config."""
        return cls(cast(CausalLM, model).get_output_embeddings(), **transform_of(model), backend=backend, group=group)

    @classmethod
    def replacing(
        cls,
        layer: nn.Module,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        backend: str = "auto",
        float32: bool = False,
    ) -> FusedHead:
        """Return a head that replaces a layer in a model and has its parameters under the same names.

        Outside `taking`, its `forward` returns what the layer returns; the model applies softcap and scale.
        """
        head = cls(layer, softcap=softcap, logit_scale=logit_scale, backend=backend, float32=float32)
        if isinstance(layer, nn.Linear) and not is_quantised(layer):
            head.layer = None
            head.weight, head.bias = layer.weight, layer.bias
        return head

    def logits(self, hidden: Tensor) -> Tensor:  # (..., H) -> (..., V)
        """Return the logits, with softcap and scale; meant for the few rows that sampling needs."""
        return self.transform(self._product(hidden))

    def transform(self, product: Tensor) -> Tensor:  # (..., V) -> (..., V)
        """Return `softcap * tanh(logit_scale * product / softcap)`."""
        return Transform(softcap=self.softcap, logit_scale=self.logit_scale).capped(product)

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
        """Return the log-probs of `ids`, and the entropy if `entropy=True`; see `linear_token_logprobs`."""
        hidden, weight, bias, low_rank = self.matrices(hidden, mask)
        with self._precision(hidden):
            return linear_token_logprobs(
                hidden,
                weight,
                ids,
                bias=bias,
                low_rank=low_rank,
                temperature=temperature,
                mask=mask,
                entropy=entropy,
                chunk_tokens=chunk_tokens,
                group=self.group,
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
        """Return the PPO loss of the policy head and the optional value head; see `linear_ppo_loss`."""
        hidden, weight, bias, low_rank = self.matrices(hidden, tokens_of(options.get("nll_mask"), mask))
        with self._precision(hidden):
            return linear_ppo_loss(
                hidden,
                weight,
                ids,
                old_logprobs,
                advantages,
                mask,
                bias=bias,
                low_rank=low_rank,
                value_weight=value_weight,
                value_bias=value_bias,
                temperature=temperature,
                chunk_tokens=chunk_tokens,
                compact=compact,
                group=self.group,
                **self._options(),
                **options,
            )

    def topk_kl(
        self,
        hidden: Tensor,  # (B, T, H) or (N, H)
        teacher_ids: Tensor,  # (B, T, K) or (N, K)
        teacher_logprobs: Tensor,  # (B, T, K) or (N, K)
        mask: Tensor,  # (B, T) or (N,), bool
        *,
        direction: str = "forward",
        tail: str = "drop",
        beta: float = 0.5,
        weights: Tensor | None = None,  # (B, T) or (N,)
        num_tokens: float | Tensor | None = None,
        temperature: float | Tensor = 1.0,
        chunk_tokens: int | None = None,
        compact: bool | None = None,
    ) -> TopkKL:
        """Return the divergence from the teacher's K most probable tokens; see `linear_topk_kl`."""
        self._check_whole("topk_kl")
        hidden, weight, bias, low_rank = self.matrices(hidden, mask)
        with self._precision(hidden):
            return linear_topk_kl(
                hidden,
                weight,
                teacher_ids,
                teacher_logprobs,
                mask,
                direction=direction,
                tail=tail,
                beta=beta,
                weights=weights,
                num_tokens=num_tokens,
                bias=bias,
                low_rank=low_rank,
                temperature=temperature,
                chunk_tokens=chunk_tokens,
                compact=compact,
                **self._options(),
            )

    def matrices(self, hidden: Tensor, mask: Tensor | None = None) -> Matrices:  # (..., H), (...)
        """Return the operands of the product, with `(s A h, B)` as low-rank term for LoRA.

        Hidden states may be NaN where `mask` is False.

        Raises:
            ValueError: the weight is sharded without `group` or in an unknown format; the adapters are both merged and
                disabled; an adapter is a LoRA variant.
        """
        found = operands(self if self.layer is None else self.layer, hidden, mask, sharded=self.group is not None)
        return found.float() if self.float32 else found

    @contextmanager
    def taking(
        self, ids: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None, shifted: bool = False
    ) -> Generator[WantedTokens, None, None]:
        """Return a context in which the model that contains this `replacing` head outputs (B, K, 2) instead of logits.

            with head.taking(ids) as wanted:
                output = model(input_ids=..., logits_to_keep=K + 1)
            logprobs, entropy = wanted.result(output.logits)

        where `ids` (B, K) are the last K tokens of the model's input, and log-probs and entropy are (B, K). The model
        must compute K + 1 positions or more. With `shifted=True` it must compute K positions or more, and `ids` are the
        tokens that follow the last K positions. Log-prob and entropy are 0 where `mask` is False.

        The results pass through the model's outputs because FSDP2 and ZeRO-3 attach hooks to outputs that need a
        gradient.

        Raises:
            RuntimeError: a `taking` context of this head is already open.
        """
        if self._wanted is not None:
            raise RuntimeError(
                "taking: the head already scores other tokens; leave that `taking` context before you open a new one"
            )
        self._wanted = WantedTokens(self, ids, temperature, mask, shifted)
        try:
            yield self._wanted
        finally:
            self._wanted = None

    def forward(self, hidden: Tensor) -> Tensor:  # (B, T, H)
        """Return the linear layer's result (B, T, V), without softcap and scale; inside `taking`, (B, K, 2)."""
        return self._product(hidden) if self._wanted is None else self._wanted.outputs(hidden)

    def install(self) -> None:
        """Replace the `forward` of a layer that stays in its model, so that the model's parameters keep their names.

        peft finds the modules that it saves by their names, so a wrapper of peft's cannot be a submodule of the head there.
        """
        assert self.layer is not None
        self.layer.__dict__["forward"] = self  # not an attribute of a module, which would register the head

    @staticmethod
    def installed_in(layer: nn.Module) -> FusedHead | None:
        """Return the head that replaces `layer` or its `forward`."""
        found = layer if isinstance(layer, FusedHead) else layer.__dict__.get("forward")
        return found if isinstance(found, FusedHead) else None

    def uninstall(self) -> None:
        """Undo `install`."""
        assert self.layer is not None
        del self.layer.__dict__["forward"]

    def _check_whole(self, method: str) -> None:
        if self.group is not None:
            raise ValueError(
                f"group: {method} of a FusedHead needs the logits of all ids, and each rank of the group has a part of them; "
                "call logprobs or ppo_loss"
            )

    def _product(self, hidden: Tensor) -> Tensor:
        self._check_whole("the product")
        if self.float32:
            with self._precision(hidden):
                return self.matrices(hidden).product()
        if self.layer is None:
            return F.linear(hidden, self.weight, self.bias)
        if self.installed_in(self.layer) is self:
            return type(self.layer).forward(self.layer, hidden)
        return self.layer(hidden)

    def _precision(self, hidden: Tensor) -> AbstractContextManager[object]:
        return torch.autocast(hidden.device.type, enabled=False) if self.float32 else nullcontext()

    def _options(self) -> dict[str, Any]:
        return {"softcap": self.softcap, "logit_scale": self.logit_scale, "backend": self.backend}


def _without_layer(module: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Remove `layer.` from the names of the parameters in a state dict."""
    for key in [k for k in state if k.startswith(f"{prefix}layer.")]:
        state[prefix + key.removeprefix(f"{prefix}layer.")] = state.pop(key)


def _with_layer(module: FusedHead, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add `layer.` to the names of the parameters in a state dict, the inverse of `_without_layer`."""
    for key in [k for k in state if k.startswith(prefix)] if module.layer is not None else ():
        state[f"{prefix}layer.{key.removeprefix(prefix)}"] = state.pop(key)
