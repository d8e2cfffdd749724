"""The definition of `sample_tokens` and of its random numbers in eager PyTorch."""

import math

import torch
from torch import Tensor

from ..launch_args import SampledTokens
from .token_logprobs import transform_logits

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox(
    key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x32-10 of a key and a counter, which are 32-bit words in int64 tensors.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # A 32 x 32 -> 64 bit product is computed from 16-bit halves, because int64 would overflow.
        (hi0, lo0), (hi1, lo1) = _mul(c0, _M0), _mul(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def _mul(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform(seed: int, sequence: Tensor, position: Tensor) -> Tensor:
    """Return a float64 in [0, 1) per (seed, sequence, position), from 53 bits of the first two Philox words."""
    seed &= (1 << 64) - 1
    counter = (position & _LOW, (position >> 32) & _LOW, sequence & _LOW, (sequence >> 32) & _LOW)
    w0, w1, _, _ = philox((seed & _LOW, seed >> 32), counter)
    return (((w0 << 21) ^ (w1 >> 11)) & ((1 << 53) - 1)).double() * 2.0**-53


def sample_tokens(
    logits: Tensor,  # (B, V)
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int,
    sequence: Tensor,  # (B,), int64
    position: Tensor,  # (B,), int64
) -> SampledTokens:
    """Sample by the inverse CDF in vocabulary order, from the tokens that top-k, then top-p, then min-p keep.

    Each filter keeps all ties at its limit.
    """
    z = kept = transform_logits(logits, temperature=temperature)
    logp = torch.log_softmax(z, -1)
    if top_k is not None and top_k < z.shape[-1]:
        kept = kept.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1:
        p = kept.double().softmax(-1)
        largest = p.sort(-1, descending=True).values
        enough = (largest.cumsum(-1) < top_p).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
        kept = kept.masked_fill(p < largest.gather(-1, enough), -torch.inf)
    if min_p is not None and min_p > 0:
        # p < min_p * p_max, compared on the logits, so that the comparison is the same on every backend
        kept = kept.masked_fill(z < z.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    kept = torch.log_softmax(kept, -1)
    cdf = kept.double().exp().cumsum(-1)
    threshold = uniform(seed, sequence, position)[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return SampledTokens(ids.squeeze(-1), logp.gather(-1, ids).squeeze(-1), kept.gather(-1, ids).squeeze(-1))
