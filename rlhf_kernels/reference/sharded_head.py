# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# torch does not declare the types of `Function.apply` and of the collectives.
"""The definitions of `linear_token_logprobs` and `linear_ppo_loss` for a weight that is sharded by rows, in eager PyTorch.

The sums over ranks are those of Megatron-LM (Shoeybi et al. 2019): a sum in forward has the identity as backward, because
every rank computes the same loss from it, and a replicated tensor has a sum in backward.
"""

from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from .._options import PPOOptions
from ..launch_args import PPOLoss, TokenLogprobs
from .ppo_loss import head_values, ppo_loss, seen_tokens
from .token_logprobs import linear_logits, transform_logits


class _Sum(torch.autograd.Function):
    """The sum over the ranks, whose gradient is replicated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return _all_reduced(x, group, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _Replicated(torch.autograd.Function):
    """A replicated tensor from which each rank computes a part, so that its gradient is a sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_reduced(grad, ctx.group, dist.ReduceOp.SUM), None


def _all_reduced(x: Tensor, group: Any, op: Any) -> Tensor:
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group=group)
    return x


def sharded_token_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V / ranks, H)
    ids: Tensor,  # (...)
    *,
    group: Any,
    begin: int,
    bias: Tensor | None = None,  # (V / ranks,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R) and (V / ranks, R)
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # (...), bool
    entropy: bool = False,
) -> TokenLogprobs:
    """Return `log p(ids) = z[ids] - logsumexp(z)` and `H = -sum p log p`, with sums over the shards of z.

    The ids of this rank begin with `begin`. The results are 0 where the mask is False.
    """
    hidden = _Replicated.apply(hidden, group)
    if low_rank is not None:
        low_rank = _Replicated.apply(low_rank[0], group), low_rank[1]
    if mask is not None and isinstance(temperature, Tensor):
        temperature = torch.where(mask, temperature, 1)
    logits = linear_logits(hidden, weight, bias, low_rank, mask)
    z = transform_logits(logits, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    high = _all_reduced(z.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    z = z - high
    log_sum = _Sum.apply(z.exp().sum(-1, keepdim=True), group).log()
    ids = ids - begin
    owned = (ids >= 0) & (ids < z.shape[-1])
    taken = z.gather(-1, torch.where(owned, ids, 0)[..., None]).squeeze(-1)
    logprobs = _Sum.apply(torch.where(owned, taken, 0), group) - log_sum.squeeze(-1)
    h = None
    if entropy:
        logp = z - _Replicated.apply(log_sum, group)
        # p log p = 0 for a logit of -inf, with gradient 0.
        h = -_Sum.apply((logp.exp() * torch.where(logp == -torch.inf, 0, logp)).sum(-1), group)
    if mask is not None:
        logprobs = torch.where(mask, logprobs, 0)
        h = None if h is None else torch.where(mask, h, 0)
    return TokenLogprobs(logprobs, h)


def sharded_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    group: Any,
    begin: int,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    value_weight: Tensor | None = None,
    value_bias: Tensor | None = None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    **options: Unpack[PPOOptions],
) -> PPOLoss:
    """Return `ppo_loss` of the log-probs and entropies of all shards, with values from the replicated hidden states."""
    if value_weight is not None:
        options["values"] = head_values(hidden, value_weight, value_bias, mask, options)
    head = {
        "bias": bias,
        "low_rank": low_rank,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    place: dict[str, Any] = {"group": group, "begin": begin}
    seen = seen_tokens(mask, options)
    taken = sharded_token_logprobs(hidden, weight, ids, mask=seen, entropy=True, **place, **head)
    options["entropy"] = taken.entropy
    return ppo_loss(taken.logprobs, old_logprobs, advantages, mask, **options)
