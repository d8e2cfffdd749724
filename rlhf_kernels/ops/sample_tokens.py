"""One sampled token a row, from counters instead of a generator."""

from torch import Tensor

from .. import reference
from ..types import SampledTokens
from . import checks


def sample_tokens(
    logits: Tensor,  # (B, V)
    *,
    temperature: float | Tensor = 1.0,  # or (B,)
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int,
    sequence: Tensor,  # (B,), int64
    position: Tensor,  # (B,), int64
    backend: str = "auto",
) -> SampledTokens:
    """Samples one id a row of `softmax(logits / temperature)`, restricted to what top-k, then top-p, then min-p keep.

    `top_k` keeps the k largest; `top_p` the smallest set of the largest whose probabilities (renormalised after top-k)
    reach p; `min_p` those with at least `min_p` times the largest probability. Ties at a limit are all kept. The random
    number is Philox4x32-10 with key `seed` and counter (position, sequence): a row's sample depends on nothing else, so
    not on its slot, its batch or a restart. `logprobs` are under the full tempered softmax, `sampling_logprobs` under the
    kept set. No gradient.

    Source: Salmon et al. 2011 (Philox); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).

    Raises:
        ValueError: a shape, dtype, device or range that does not fit, with the argument's name.
    """
    checks.floating("logits", logits, dims=(2,), what="[B, V]")
    b, v = logits.shape
    if v == 0:
        raise ValueError("logits: got an empty vocabulary, expected V >= 1")
    checks.temperature(temperature, like=logits, expected=(b,))
    checks.number("top_k", top_k, least=1)
    checks.number("top_p", top_p, above=0, most=1)
    checks.number("min_p", min_p, least=0, most=1)
    for name, x in (("sequence", sequence), ("position", position)):
        checks.integers(name, x, like=logits, expected=(b,), what="one number a row")
    return reference.sample_tokens(
        logits.detach(),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        sequence=sequence.long(),
        position=position.long(),
    )
