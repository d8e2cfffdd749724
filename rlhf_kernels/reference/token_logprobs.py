"""The definitions of `token_logprobs` and `linear_token_logprobs` in eager PyTorch."""

import torch
from torch import Tensor

from ..launch_args import TokenLogprobs


def transform_logits(
    logits: Tensor, *, temperature: float | Tensor = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """Return `z = softcap * tanh(logit_scale * logits / softcap) / temperature`, in float32 or wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None].to(z.dtype)
    return z / temperature


def token_logprobs(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (...)
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # (...), bool
    entropy: bool = False,
) -> TokenLogprobs:
    """Return `log p(ids) = z[ids] - logsumexp(z)` and `H = -sum p log p`; 0 where the mask is False."""
    if mask is not None:
        ids = torch.where(mask, ids, 0)
        logits = torch.where(
            mask[..., None], logits, 0
        )  # a masked row may be inf or NaN; 0 * inf must not reach a gradient
        if isinstance(temperature, Tensor):
            temperature = torch.where(mask, temperature, 1)
    z = transform_logits(logits, temperature=temperature, softcap=softcap, logit_scale=logit_scale)
    logp = torch.log_softmax(z, -1)
    taken = logp.gather(-1, ids[..., None]).squeeze(-1)
    h = None
    if entropy:
        # p log p = 0 for a logit of -inf, with gradient 0; NaN stays NaN.
        h = -(logp.exp() * torch.where(logp == -torch.inf, 0, logp)).sum(-1)
    if mask is not None:
        taken = torch.where(mask, taken, 0)
        h = None if h is None else torch.where(mask, h, 0)
    return TokenLogprobs(taken, h)


def linear_logits(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None,  # (..., R) and (V, R)
    mask: Tensor | None,  # (...), bool
) -> Tensor:  # (..., V)
    """Return `hidden @ weight.T + bias`, plus `low_rank[0] @ low_rank[1].T`."""

    def unmasked(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask[..., None], x, 0)  # masked rows may be NaN

    logits = torch.nn.functional.linear(unmasked(hidden), weight, bias)
    return logits if low_rank is None else logits + unmasked(low_rank[0]) @ low_rank[1].T


def linear_token_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R) and (V, R)
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # (...), bool
    entropy: bool = False,
) -> TokenLogprobs:
    """Return `token_logprobs` of `linear_logits(...)`."""
    logits = linear_logits(hidden, weight, bias, low_rank, mask)
    transform = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    return token_logprobs(logits, ids, **transform, mask=mask, entropy=entropy)
