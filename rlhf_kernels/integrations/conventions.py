"""What the adapters share: a peer's mask as ours, its releases, statistics that reach entries which do not count."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Required, TypedDict, TypeVar

import torch
from torch import Tensor

from .._options import Aggregation
from ..ops import checks, masked_mean, ppo_loss

T = TypeVar("T")


class AggregationOptions(TypedDict, total=False):
    """The options of `ppo_loss` that reduce a term over its tokens."""

    aggregation: Required[Aggregation]
    num_tokens: float | Tensor | None
    num_sequences: float | Tensor | None


def counted(name: str, mask: Tensor | None, like: Tensor, *, from_start: bool = False) -> Tensor:
    """A peer's mask, of bool or 0 and 1 in any dtype, as bool; None counts everything.

    `from_start`: the peer's rows begin with a token that counts, so that a batch in which every row turns from False to True
    and never back is a padding mask, True where nothing counts.
    """
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    dtypes = (*checks.BOOL, *checks.FLOATS, torch.int64, torch.int32, torch.uint8)
    checks.tensor(name, mask, like=like, expected=like.shape, what="the shape of the token tensors", dtypes=dtypes)
    if mask.dtype is not torch.bool:
        if checks.values_visible(mask):
            other = mask[(mask != 0) & (mask != 1)]
            if other.numel():
                raise ValueError(
                    f"{name}: got {other[0].item()} among its values, expected bool, or 1 that counts and 0"
                )
        mask = mask != 0
    if from_start and checks.values_visible(mask) and _is_padding(mask):
        raise ValueError(
            f"{name}: got a padding mask (every row turns from False to True and none back), expected True where a token "
            "counts: pass its negation, or faithful=True if that is what you mean"
        )
    return mask


def _is_padding(mask: Tensor) -> bool:
    if mask.dim() != 2 or mask.shape[1] < 2:
        return False
    never_back = ~(mask[:, :-1] & ~mask[:, 1:]).any()
    return bool(never_back & (~mask[:, 0] & mask[:, -1]).any())


def release(peer: str, asked: str | None, known: dict[str, T]) -> T:
    """What `known` has for a release of `peer`, by its leading numbers; None: the installed one. ValueError for others."""
    if asked is None:
        try:
            asked = version(peer)
        except PackageNotFoundError:
            raise ValueError(
                f"version: got None and {peer} is not installed, expected one of {', '.join(known)}"
            ) from None
    for numbers, value in known.items():
        if asked == numbers or asked.startswith(f"{numbers}."):
            return value
    raise ValueError(f"version: got {peer} {asked}, expected one of {', '.join(known)}")


def refuse(peer: str, **arguments: object) -> None:
    """ValueError for an argument that the peer takes and we do not; None, False and 0 ask for nothing."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) or (value is not None and value is not False and value != 0):
            raise ValueError(
                f"{name}: got {type(value).__name__}, which {peer} takes and this adapter does not; leave it out"
            )


def mean(x: Tensor, mask: Tensor, *, faithful: bool = False) -> Tensor:
    """Masked mean; with nothing True 0, or the peers' NaN."""
    result = masked_mean(x, mask)
    return result / mask.any() if faithful else result


def variance(x: Tensor, mask: Tensor, *, unbiased: bool = True) -> Tensor:
    """Masked variance, NaN where the peers' is."""
    n = mask.sum()
    biased = mean((x - mean(x, mask)).square(), mask, faithful=True)
    return biased * (n / (n - 1)) if unbiased else biased


def whiten_everywhere(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Whitening as the peers write it: entries that do not count are shifted and scaled with the rest."""
    if checks.values_visible(mask) and not bool(mask.any()):
        raise ValueError("mask: got no True, expected at least one: the peer raises here")
    centre = mean(x, mask)
    white = (x - centre) * torch.rsqrt(variance(x, mask) + 1e-8)
    return white if shift_mean else white + centre


def local_fraction(metric: Tensor, given: float | Tensor | None, mask: Tensor) -> Tensor:
    """A metric that `ppo_loss` divided by the global count `given`, as the mean over this batch that peers report."""
    return metric if given is None else metric * given / mask.sum().clamp(min=1)


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
    """Return the value term of `ppo_loss` and the fraction of this batch in which the clipped error was the larger."""
    nothing = torch.zeros_like(returns)
    loss, metrics = ppo_loss(
        nothing,
        nothing,
        nothing,
        mask,
        values=values,
        old_values=old_values,
        returns=returns,
        cliprange_value=cliprange,
        vf_coef=1.0,
        aggregation=aggregation,
        num_value_tokens=num_tokens,
        num_sequences=num_sequences,
    )
    return loss, local_fraction(metrics["value_clipfrac"], num_tokens, mask)
