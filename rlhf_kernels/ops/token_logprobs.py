"""Log-probability and entropy of taken tokens, from logits."""

from torch import Tensor

from .. import reference
from ..backend import resolve
from ..types import TokenLogprobs
from . import checks


def token_logprobs(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (...)
    *,
    temperature: float | Tensor = 1.0,  # or (...)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # (...), bool
    entropy: bool = False,
    backend: str = "auto",
) -> TokenLogprobs:
    """`log softmax(z)[ids]` and, when asked, `H = -Σ p log p`, in float32, differentiable in `logits`.

        z = softcap * tanh(logit_scale * logits / softcap) / temperature

    Where `mask` is False both are 0, the row is never read and its gradient is 0.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit; on CPU an id outside [0, V) under a True mask.
    """
    check_logits(logits, ids, temperature, softcap, mask)
    assert resolve(backend, logits) == "reference"
    return reference.token_logprobs(
        logits,
        ids.long(),
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
        entropy=entropy,
    )


def check_logits(logits: Tensor, ids: Tensor, temperature, softcap, mask) -> None:
    checks.floating("logits", logits, dims=tuple(range(1, 8)), what="[..., V]")
    rows = logits.shape[:-1]
    if mask is not None:
        checks.mask("mask", mask, like=logits, expected=rows, what="the shape of ids")
    checks.ids(ids, like=logits, expected=rows, vocabulary=logits.shape[-1], where=mask)
    checks.temperature(temperature, like=logits, expected=rows)
    checks.number("softcap", softcap, above=0)
