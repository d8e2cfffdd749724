"""Selection of the tokens at which the policy is most uncertain."""

import torch
from torch import Tensor

from ..backend import define, kernels, resolve
from ..token_args import ENTROPY_METRICS, TokenSelection
from . import checks


def top_entropy_mask(
    entropy: Tensor,  # any shape
    mask: Tensor,  # same shape, bool
    *,
    entropy_quantile: float,
    backend: str = "auto",
) -> TokenSelection:
    """Return the mask of the share `entropy_quantile` of the tokens with the highest entropy.

        kept_t = mask_t and H_t >= quantile(H of the True tokens, 1 - entropy_quantile)

    where H is `entropy` and the quantile is interpolated linearly between two tokens. Equal entropies are kept
    together. 1 keeps all tokens, and 0 keeps only the highest entropy. If an entropy of a True token is NaN, no token
    is kept. `metrics` has `entropy_threshold`, `rejected_share` and `num_tokens`, the number of True tokens. There is
    no gradient.

    Source: Wang et al. 2025, "Beyond the 80/20 Rule", eq. 5 and 6, who keep 0.2.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or `entropy_quantile` outside [0, 1].
    """
    checks.floating("entropy", entropy, dims=tuple(range(8)), what="any shape")
    checks.mask("mask", mask, like=entropy, expected=entropy.shape, what="the shape of entropy")
    checks.number("entropy_quantile", entropy_quantile, least=0, most=1)
    entropy = checks.wide(entropy)
    chosen = resolve("top_entropy_mask", backend, entropy)
    if chosen == "reference":
        from .. import reference

        return reference.top_entropy_mask(entropy, mask, entropy_quantile=entropy_quantile)
    run = _run if checks.is_eager(entropy) else _op
    kept, metrics = run(entropy, mask, float(entropy_quantile), chosen)
    return TokenSelection(kept, dict(zip(ENTROPY_METRICS, metrics.unbind(), strict=True)))


def _run(entropy: Tensor, mask: Tensor, share: float, backend: str) -> tuple[Tensor, Tensor]:
    return kernels(backend).top_entropy_mask(checks.dense(entropy), mask.contiguous(), share)


def _fake(entropy: Tensor, mask: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape), entropy.new_empty(len(ENTROPY_METRICS), dtype=torch.float32)


_op = define(
    "top_entropy_mask(Tensor entropy, Tensor mask, float share, str backend) -> (Tensor kept, Tensor metrics)",
    run=_run,
    fake=_fake,
)
