"""Policy and value function on one trunk, from any Hugging Face causal language model.

The trunk runs once; the fused ops of `rlhf_kernels` read its hidden states with the weight of the language-model head,
which is called itself for the logits of a decode step alone. So no [B, T, V] tensor exists, and positions that take no action
cost no logits. On a processor without instructions for half precision its linear layers become `UpcastLinear`s.
Shapes: B sequences, S input positions, T or N actions, V vocabulary, H hidden.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rlhf_engine.model.heads import HeadTransform, ValueHead
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.trunk import check_packing, checkpoint_layers, last_hidden, packs, products
from rlhf_engine.model.upcast import upcast_products
from rlhf_kernels import PPOLoss, TokenLogprobs, linear_ppo_loss, linear_token_logprobs

_PROBE_LOGIT = 60.0
"""Largest logit of the check at construction: far enough for a softcap to bend, whatever the initialisation."""


class ActorCritic(nn.Module):
    """A causal language model as policy, with a value head on the same hidden states or a value model beside it.

    On construction the log-probs of a few tokens are compared with the model's own; ValueError if they differ. The trunk
    stays in evaluation mode: dropout would make the ratio of one policy with itself differ from 1.

    `compute_dtype` is that of matrix products, None the weights' own; log-probs, values and gradients are the weights' still.
    With `gradient_checkpointing` a backward pass runs the trunk's layers again. A value model has settings of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        value_head: ValueHead | None = None,
        *,
        value_model: RewardModel | None = None,
        backend: str = "auto",
        compute_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if model.get_output_embeddings() is None:
            raise ValueError(f"model: got {type(model).__name__}, which has no output embeddings; expected a causal LM")
        self.model = model
        self.trunk_name = _trunk_name(model)
        self.transform = HeadTransform.from_config(model.config)
        self.backend, self.compute_dtype = backend, None
        hidden_size = self.lm_weight.shape[1]
        if value_model is not None and value_head is not None:
            raise ValueError("value_model: got one beside a value_head, expected one of the two")
        self.value_model = value_model
        self.value_head = value_head
        if value_head is None and value_model is None:
            self.value_head = ValueHead(hidden_size, self.lm_weight.device)
        if self.value_head is not None and self.value_head.weight.shape != (hidden_size,):
            got = tuple(self.value_head.weight.shape)
            raise ValueError(f"value_head: got a weight of shape {got}, expected ({hidden_size},), the hidden size")
        self.eval()
        self._check_head()
        self.compute_dtype = None if compute_dtype == model.dtype else compute_dtype
        upcast_products(model, self.product_dtype)
        if gradient_checkpointing:
            checkpoint_layers(self.trunk)
        self.packs = all(packs(*trunk) for trunk in self._trunks())
        """Whether micro-batches of a token budget are packed."""

    @property
    def trunk(self) -> nn.Module:
        """The model without its language-model head."""
        return self.model.get_submodule(self.trunk_name)

    @property
    def lm_weight(self) -> Tensor:  # (V, H)
        return self.model.get_output_embeddings().weight

    @property
    def lm_bias(self) -> Tensor | None:  # (V,)
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def product_dtype(self) -> torch.dtype:
        """Type of the matrix products, and of keys and values."""
        return self.compute_dtype or self.lm_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_weight.device

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the heads; the trunk keeps evaluation mode (no dropout), which does not stop gradients."""
        super().train(mode)
        self.model.eval()
        if self.value_model is not None:
            self.value_model.eval()
        return self

    def hidden(
        self,
        input_ids: Tensor,  # (B, S)
        attention_mask: Tensor | dict[str, Tensor] | None = None,  # (B, S), or prepared as transformers takes it
        position_ids: Tensor | None = None,  # (B, S)
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        *,
        cu_inputs: Tensor | None = None,  # (B + 1,), where each sequence begins in packed `input_ids` [1, N]
    ) -> Tensor:  # (B, S, H) or (1, N, H)
        """Last hidden states, after the final norm. Row s belongs to the state in which token s + 1 is the action.

        Without `position_ids` they are counted from the attention mask, so that left padding changes nothing; without
        either, sequences start at column 0. `past_key_values` is updated in place.
        """
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return last_hidden(
            self.trunk,
            input_ids,
            compute_dtype=self.compute_dtype,
            cu_inputs=cu_inputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )

    def logits(self, hidden: Tensor) -> Tensor:  # (..., H) -> (..., V)
        """Logits of a few rows, for sampling."""
        with self.products():
            return self.transform(self.model.get_output_embeddings()(hidden))

    def products(self) -> AbstractContextManager[None]:
        """Matrix products within are made in `compute_dtype`; around many forward passes, weights are copied once."""
        return products(self.compute_dtype, self.device)

    def values(self, hidden: Tensor) -> Tensor:  # (..., H) -> (...), float32
        """V of every state as the value head has it; 0 where the value function is a model of its own."""
        if self.value_head is None:
            return hidden.new_zeros(hidden.shape[:-1], dtype=torch.float32)
        return self.value_head(hidden)

    def state_values(
        self,
        batch: TokenBatch,
        hidden: Tensor | None,  # (N, H), the policy's there; not read where the value function is a model of its own
    ) -> Tensor:  # (N,), float32
        """V of the states of a batch's actions, whoever has the value function."""
        if self.value_model is None:
            return self.values(hidden)
        return self.value_model.values(batch.input_ids, batch.rows, batch.cu_inputs)

    def check_packing(self) -> None:
        """ValueError where `packs` is on and a trunk's packed sequences see each other."""
        for trunk in self._trunks() if self.packs else ():
            check_packing(*trunk)

    def _trunks(self) -> list[tuple[PreTrainedModel, torch.dtype | None]]:
        """Of the policy and of a value model, with the type of its products."""
        values = [] if self.value_model is None else [(self.value_model.trunk, self.value_model.compute_dtype)]
        return [(self.trunk, self.compute_dtype), *values]

    def value_parameters(self) -> list[nn.Parameter]:
        """Those of the value function alone."""
        return list((self.value_head if self.value_model is None else self.value_model).parameters())

    def token_logprobs(
        self,
        hidden: Tensor,  # (..., H)
        ids: Tensor,  # (...)
        **options: Any,
    ) -> TokenLogprobs:
        """`rlhf_kernels.linear_token_logprobs` with this model's head; `options` are temperature, mask, entropy."""
        with self.products():
            return linear_token_logprobs(hidden, self.lm_weight, ids, **self._head_options(), **options)

    def ppo_loss(
        self,
        hidden: Tensor,  # (B, T, H) or (N, H)
        ids: Tensor,  # (B, T) or (N,)
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,  # bool
        **options: Any,
    ) -> PPOLoss:
        """`rlhf_kernels.linear_ppo_loss` with this model's two heads; `options` are that function's."""
        if self.value_head is not None:
            options |= {"value_weight": self.value_head.weight, "value_bias": self.value_head.bias}
        with self.products():
            return linear_ppo_loss(
                hidden,
                self.lm_weight,
                ids,
                old_logprobs,
                advantages,
                mask,
                **self._head_options(),
                **options,
            )

    def language_model_loss(
        self,
        input_ids: Tensor,  # (B, S), whole sequences without padding
        *,
        num_tokens: int,
    ) -> Tensor:  # ()
        """`-sum log pi(x_s | x_<s) / num_tokens` over all tokens but the first of each sequence, at temperature 1."""
        hidden, ids = self.hidden(input_ids[:, :-1]).flatten(0, 1), input_ids[:, 1:].flatten()
        # -A log pi with an advantage of 1: the gradient is made in the forward pass, and no [N, V] tensor exists.
        ones = torch.ones(len(ids), device=ids.device)
        with self.products():
            result = linear_ppo_loss(
                hidden,
                self.lm_weight,
                ids,
                torch.zeros_like(ones),
                ones,
                torch.ones_like(ids, dtype=torch.bool),
                objective="policy_gradient",
                num_tokens=num_tokens,
                **self._head_options(),
            )
        return result.loss

    def forward(
        self,
        input_ids: Tensor,  # (B, S), padded on the right
        rows: Tensor,  # (N,), the states of the actions in the flattened (B * S) positions
        ids: Tensor,  # (N,)
        old_logprobs: Tensor,  # (N,)
        advantages: Tensor,  # (N,)
        mask: Tensor,  # (N,)
        *,
        cu_inputs: Tensor | None = None,  # (B + 1,), where each sequence begins in packed `input_ids` [1, sum of S]
        **options: Any,
    ) -> PPOLoss:
        """Trunk and loss in one call, so that a sharded root holds every weight, the tied head's too, where it is read."""
        hidden = self.hidden(input_ids, cu_inputs=cu_inputs).flatten(0, 1).index_select(0, rows)
        if self.value_model is not None:
            options["values"] = self.value_model.values(input_ids, rows, cu_inputs)
        return self.ppo_loss(hidden, ids, old_logprobs, advantages, mask, **options)

    def _head_options(self) -> dict[str, Any]:
        return {
            "bias": self.lm_bias,
            "softcap": self.transform.softcap,
            "logit_scale": self.transform.logit_scale,
            "backend": self.backend,
        }

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compare with the model's own log-probs, the product of its head blown up so that any transform shows."""
        vocabulary = self.lm_weight.shape[0]
        ids = torch.arange(1, 9, device=self.device).remainder(vocabulary)[None]
        hidden = self.hidden(ids)
        product = nn.functional.linear(hidden, self.lm_weight, self.lm_bias).float()
        gain = _PROBE_LOGIT / max(float(self.transform(product).abs().max()), 1e-6)
        handle = self.model.get_output_embeddings().register_forward_hook(lambda module, args, output: output * gain)
        try:
            theirs = self.model(input_ids=ids, use_cache=False).logits.float()
        finally:
            handle.remove()
        ours = self.transform(product * gain)
        difference = float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())
        # The model rounds its product, the blow-up and the transform to the weights' type.
        allowed = _PROBE_LOGIT * (8 * torch.finfo(self.lm_weight.dtype).eps + 1e-6)
        if not difference <= allowed:
            raise ValueError(
                f"model: {type(self.model).__name__}'s own log-probs differ from those made of its hidden states by "
                f"{difference:.3g} (at most {allowed:.3g} expected); {self.transform.explain(product * gain, theirs)}"
            )


def _trunk_name(model: PreTrainedModel) -> str:
    """Attribute path of the module that makes the last hidden states."""
    trunk = model.base_model if model.base_model is not model else model.get_decoder()
    for name, module in model.named_modules():
        if module is trunk and name:
            return name
    raise ValueError(
        f"model: found no trunk in {type(model).__name__}; expected a base_model or get_decoder() of its own"
    )


def frozen_copy(policy: ActorCritic) -> ActorCritic:
    """A deep copy of `policy` as it is now, without gradients; costs the weights once more.

    It answers `hidden` and `token_logprobs`; its value head is the policy's and has no use, and a value model is not copied.
    """
    left_out = {} if policy.value_model is None else {id(policy.value_model): None}
    return copy.deepcopy(policy, left_out).requires_grad_(False)
