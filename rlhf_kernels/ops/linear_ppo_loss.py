"""The PPO objective from hidden states: policy and value head in one read, three matrix products, no [N, V] tensor."""

from typing import Any

from torch import Tensor

from .. import reference
from ..backend import resolve
from ..types import PPOLoss
from . import checks
from .linear_token_logprobs import check_head
from .ppo_arguments import PPOArguments


def linear_ppo_loss(
    hidden: Tensor,  # (B, T, H) or (N, H), differentiable
    weight: Tensor,  # (V, H), differentiable
    ids: Tensor,  # (B, T) or (N,)
    old_logprobs: Tensor,  # (B, T) or (N,)
    advantages: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    bias: Tensor | None = None,  # (V,), differentiable
    value_weight: Tensor | None = None,  # (H,), differentiable
    value_bias: Tensor | None = None,  # (), differentiable
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    compact: bool | None = None,
    backend: str = "auto",
    **options: Any,
) -> PPOLoss:
    """`logits_ppo_loss` of `hidden @ weight.T + bias`, and the value loss of `hidden @ value_weight + value_bias`.

    Gradients are made in the forward pass, chunk by chunk, and scaled in backward: a second backward raises, and a
    checkpointed region would do the work twice. Masked rows enter no matrix product; rows whose log-prob and entropy
    coefficients are exactly zero (clipped, no advantage) enter none of the backward ones. `compact` is for devices where
    finding those rows costs a copy to the host; on CPU they are always left out. `options` are those of `ppo_loss`,
    without `entropy`; `values=` is for a value model of its own and excludes `value_weight`.

    Raises:
        ValueError: as `linear_token_logprobs` and `ppo_loss`.
    """
    args = PPOArguments.parse("linear_ppo_loss", options)
    check_head(hidden, weight, ids, bias, temperature, softcap, mask, chunk_tokens)
    args.check(ids, old_logprobs, advantages, mask, name="ids", value_head=value_weight is not None)
    if args.entropy is not None:
        raise ValueError("entropy: got a tensor, expected None: this op makes the entropy itself")
    check_value_head(hidden, value_weight, value_bias)
    assert resolve(backend, hidden) == "reference"
    return reference.linear_ppo_loss(
        hidden,
        weight,
        ids.long(),
        old_logprobs,
        advantages,
        mask,
        bias=bias,
        value_weight=value_weight,
        value_bias=value_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        **args.options(),
    )


def check_value_head(hidden: Tensor, value_weight: Tensor | None, value_bias: Tensor | None) -> None:
    if value_weight is not None:
        checks.tensor("value_weight", value_weight, like=hidden, expected=hidden.shape[-1:], what="[H]")
    if value_bias is not None:
        if value_weight is None:
            raise ValueError("value_bias: got a tensor without value_weight, expected both or neither")
        checks.tensor("value_bias", value_bias, like=hidden, expected=(), what="a scalar")
