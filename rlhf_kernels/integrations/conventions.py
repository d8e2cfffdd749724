"""Helpers that the adapters share: conversion of masks, selection of a release, and statistics as the peers compute them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Required, TypedDict, TypeVar

import torch
from torch import Tensor

from .._options import Aggregation, PPOArguments, PPOOptions
from ..launch_args import METRICS
from ..ops import checks, masked_mean, ppo_loss
from ..ops.direct_ppo_loss import loss_and_metrics, serves_values

T = TypeVar("T")


class AggregationOptions(TypedDict, total=False):
    """The options of `ppo_loss` for the reduction of a term over its tokens."""

    aggregation: Required[Aggregation]
    num_tokens: float | Tensor | None
    num_sequences: float | Tensor | None


def counted(name: str, mask: Tensor | None, like: Tensor, *, from_start: bool = False) -> Tensor:
    """Return a peer's mask (bool, or 0 and 1 in any dtype) as bool; None gives a mask that is True everywhere.

    `from_start` states that a row of the peer's mask begins with True. A mask in which some row changes from False to
    True, and no row from True to False, is then refused as a padding mask (True at padding).

    Raises:
        ValueError: a shape, dtype or value that does not fit, or a padding mask.
    """
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    dtypes = (*checks.BOOL, *checks.FLOATS, torch.int64, torch.int32, torch.uint8)
    checks.tensor(name, mask, like=like, expected=like.shape, what="the shape of the token tensors", dtypes=dtypes)
    if mask.dtype is not torch.bool:
        given, mask = mask, mask != 0
        if checks.values_visible(given) and not torch.equal(mask.to(given.dtype), given):
            other = given[mask & (given != 1)]
            raise ValueError(
                f"{name}: got {other[0].item()} among its values, expected bool, or 1 for tokens that count and else 0"
            )
    if from_start and checks.values_visible(mask) and _is_padding(mask):
        raise ValueError(
            f"{name}: got a padding mask (rows change from False to True and never back), expected True where a token counts: "
            "pass its negation, or pass faithful=True if the mask is meant as it is"
        )
    return mask


def _is_padding(mask: Tensor) -> bool:
    if mask.dim() != 2 or mask.shape[1] < 2:
        return False
    never_back = ~(mask[:, :-1] & ~mask[:, 1:]).any()
    return bool(never_back & (~mask[:, 0] & mask[:, -1]).any())


def release(peer: str, asked: str | None, known: dict[str, T]) -> T:
    """Return the value in `known` for the release `asked` of `peer` (None: the installed release).

    A key of `known` is the leading numbers of a release, such as "0.11".

    Raises:
        ValueError: the release is not known, or it is None and the peer is not installed.
    """
    if asked is None:
        try:
            asked = version(peer)
        except PackageNotFoundError:
            raise ValueError(
                f"version is not set and {peer} is not installed; pass one of {', '.join(known)}"
            ) from None
    for numbers, value in known.items():
        if asked == numbers or asked.startswith(f"{numbers}."):
            return value
    raise ValueError(f"version: got {peer} {asked}, expected one of {', '.join(known)}")


def refuse(peer: str, **arguments: object) -> None:
    """Raise ValueError for an argument that the peer supports and the adapter does not, unless it is None, False or 0."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) or (value is not None and value is not False and value != 0):
            raise ValueError(
                f"{name}: got {type(value).__name__}, which {peer} supports and this adapter does not; leave it out"
            )


def mean(x: Tensor, mask: Tensor, *, faithful: bool = False) -> Tensor:
    """Return the masked mean. For an empty mask it is 0, or NaN as in the peers if `faithful`."""
    result = masked_mean(x, mask)
    return result / mask.any() if faithful else result


def variance(x: Tensor, mask: Tensor, *, unbiased: bool = True) -> Tensor:
    """Return the masked variance, which is NaN in the same cases as the peers' variance."""
    n = mask.sum()
    biased = mean((x - mean(x, mask)).square(), mask, faithful=True)
    return biased * (n / (n - 1)) if unbiased else biased


def whiten_everywhere(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Whiten `x` as the peers do: statistics are masked, but masked entries are shifted and scaled too.

    Raises:
        ValueError: a mask without a True entry (on CPU), as in the peers.
    """
    if checks.values_visible(mask) and not bool(mask.any()):
        raise ValueError(
            "mask: got no True entry, expected at least one: faithful=True raises here because the peer does"
        )
    centre = mean(x, mask)
    white = (x - centre) * torch.rsqrt(variance(x, mask) + 1e-8)
    return white if shift_mean else white + centre


def local_fraction(metric: Tensor, given: float | Tensor | None, mask: Tensor) -> Tensor:
    """Return a metric as the mean over this batch, which peers report, if `ppo_loss` divided it by the count `given`."""
    return metric if given is None else metric * given / mask.sum().clamp(min=1)


_CLIPPED = METRICS.index("value_clipfrac")


def value_loss(
    values: Tensor,  # (B, T), differentiable
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor,  # bool
    cliprange: float | None,
    *,
    aggregation: Aggregation = "token_mean",
    num_tokens: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the value term of `ppo_loss`, and the fraction of this batch's tokens whose clipped error is larger."""
    options: PPOOptions = {
        "values": values,
        "old_values": old_values,
        "returns": returns,
        "cliprange_value": cliprange,
        "vf_coef": 1.0,
        "aggregation": aggregation,
        "num_value_tokens": num_tokens,
        "num_sequences": num_sequences,
    }
    if serves_values(values, (old_values, returns), mask) and (
        cliprange is None or (type(cliprange) is float and cliprange >= 0)
    ):
        checks.denominator("num_value_tokens", num_tokens)
        checks.denominator("num_sequences", num_sequences)
        loss, numbers = loss_and_metrics(None, PPOArguments(**options), None, None, mask)
        return loss, local_fraction(numbers[_CLIPPED], num_tokens, mask)
    nothing = torch.zeros_like(returns)
    loss, metrics = ppo_loss(nothing, nothing, nothing, mask, **options)
    return loss, local_fraction(metrics["value_clipfrac"], num_tokens, mask)
