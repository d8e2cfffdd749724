"""Sampling of one token per row, with counter-based random numbers instead of a generator."""

import torch
from torch import Tensor

from ..backend import define, kernels, resolve
from ..launch_args import SampledTokens
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
    """Sample one id per row from `softmax(logits / temperature)`, restricted to the tokens that the filters keep.

    The filters are applied in this order: `top_k` keeps the k tokens with the largest logits. `top_p` keeps the
    smallest set of most probable tokens whose probabilities, renormalised after top-k, reach p. `min_p` keeps the
    tokens with at least `min_p` times the largest probability. Each filter keeps all ties at its limit.

    The random number of a row is Philox4x32-10 with key `seed` (its low 64 bits) and counter (position, sequence). A
    sample therefore depends on the row's logits, these three numbers and the options only: not on the slot, the batch
    or a restart.

    The result has the sampled `ids` (B,) int64, their `logprobs` (B,) float32 under the full softmax with temperature,
    and their `sampling_logprobs` (B,) float32 under the distribution after the filters. There is no gradient.

    Source: Salmon et al. 2011 (Philox); Holtzman et al. 2020 (top-p); Nguyen et al. 2024 (min-p).

    Raises:
        ValueError: a shape, dtype, device or range that does not fit, with the argument's name.
    """
    checks.floating("logits", logits, dims=(2,), what="[B, V]")
    b, v = logits.shape
    if v == 0:
        raise ValueError("logits: got an empty vocabulary, expected V >= 1")
    checks.temperature(temperature, like=logits, expected=(b,))
    checks.number("top_k", top_k, least=1, optional=True, integer=True)
    checks.number("top_p", top_p, above=0, most=1, optional=True)
    checks.number("min_p", min_p, least=0, most=1, optional=True)
    for name, x in (("sequence", sequence), ("position", position)):
        checks.integers(name, x, like=logits, expected=(b,), what="one number per row")
    if not isinstance(seed, int):  # pyright: ignore[reportUnnecessaryIsInstance]  # a caller may pass a float
        raise ValueError(f"seed: got {type(seed).__name__}, expected an integer")
    seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)  # its low 64 bits, as an int64
    chosen = resolve("sample_tokens", backend, logits, logits.shape[-1])
    if chosen == "reference":
        from .. import reference

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
    scalar, per_row = (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
    filters = top_k or 0, 1.0 if top_p is None else top_p, min_p or 0.0
    return SampledTokens(*_op(logits, scalar, per_row, *filters, seed, sequence, position, chosen))


def _run(
    logits: Tensor, temperature: float, temperatures: Tensor | None, top_k: int, top_p: float, min_p: float, seed: int,
    sequence: Tensor, position: Tensor, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    temperatures = None if temperatures is None else checks.dense(temperatures)
    counters = sequence.long().contiguous(), position.long().contiguous()
    return kernels(backend).sample_tokens(logits, temperature, temperatures, top_k, top_p, min_p, seed, *counters)


def _fake(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
    b = logits.shape[0]
    return tuple(logits.new_empty(b, dtype=dtype) for dtype in (torch.int64, torch.float32, torch.float32))


_op = define(
    "sample_tokens(Tensor logits, float temperature, Tensor? temperatures, SymInt top_k, float top_p, float min_p,"
    " SymInt seed, Tensor sequence, Tensor position, str backend) -> (Tensor ids, Tensor logprobs, Tensor sampling_logprobs)",
    run=_run,
    fake=_fake,
)
