"""Log-probability and entropy of taken tokens, from hidden states."""

from torch import Tensor

from .. import reference
from ..backend import resolve
from ..types import TokenLogprobs
from . import checks


def linear_token_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (...)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # (...), bool
    entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """`token_logprobs` of the logits `hidden @ weight.T + bias`, which never exist as a whole.

    The rows under a True mask are taken in chunks of `chunk_tokens` (None: chosen from the sizes); backward makes each
    chunk's logits again. Differentiable in `hidden`, `weight` and `bias`.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit; on CPU an id outside [0, V) under a True mask.
    """
    check_head(hidden, weight, ids, bias, temperature, softcap, mask, chunk_tokens)
    assert resolve(backend, hidden) == "reference"
    return reference.linear_token_logprobs(
        hidden,
        weight,
        ids.long(),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
        entropy=entropy,
    )


def check_head(hidden, weight, ids, bias, temperature, softcap, mask, chunk_tokens) -> None:
    checks.floating("hidden", hidden, dims=tuple(range(1, 8)), what="[..., H]")
    rows, h = hidden.shape[:-1], hidden.shape[-1]
    checks.floating("weight", weight, dims=(2,), what="[V, H]")
    v = weight.shape[0]
    checks.tensor("weight", weight, like=hidden, expected=(v, h), what="[V, H]", dtypes=(hidden.dtype,))
    if bias is not None:
        checks.tensor("bias", bias, like=hidden, expected=(v,), what="[V]", dtypes=(hidden.dtype,))
    if mask is not None:
        checks.mask("mask", mask, like=hidden, expected=rows, what="the shape of ids")
    checks.ids(ids, like=hidden, expected=rows, vocabulary=v, where=mask)
    checks.temperature(temperature, like=hidden, expected=rows)
    checks.number("softcap", softcap, above=0)
    checks.number("chunk_tokens", chunk_tokens, least=1)
