"""Log-probability and entropy of taken tokens, from logits."""

import torch
from torch import Tensor

from .. import _native, reference
from ..backend import kernels, resolve
from ..launch_args import LogitRows, RowStats, Transform
from ..types import TokenLogprobs
from . import checks
from .ppo_terms import flat
from .registry import define, refuse, schema_of


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
    temperature = checks.constant(temperature)
    check_logits(logits, ids, temperature, softcap, logit_scale, mask)
    chosen = resolve("token_logprobs", backend, logits, logits.shape[-1])
    if chosen == "reference":
        return reference.token_logprobs(
            logits,
            ids.long(),
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            mask=mask,
            entropy=entropy,
        )
    return fused_token_logprobs(logits, ids, temperature, softcap, logit_scale, mask, chosen, entropy=entropy)


def fused_token_logprobs(
    logits, ids, temperature, softcap, logit_scale, mask, backend: str, *, entropy: bool, inplace: bool = False
) -> TokenLogprobs:
    """The compiled form, for arguments that were checked."""
    rows = ids.shape
    per_row = flat(temperature) if isinstance(temperature, Tensor) else None
    logprobs, h, _ = _op(
        as_rows(logits),
        ids.reshape(-1).long(),
        None if mask is None else mask.reshape(-1),
        per_row,
        1.0 if per_row is not None else float(temperature),
        softcap,
        float(logit_scale),
        inplace,
        backend,
    )
    return TokenLogprobs(logprobs.view(rows), h.view(rows) if entropy else None)


def as_rows(logits: Tensor) -> Tensor:
    """(N, V) or (B, T, V) with unit stride along V; a copy only where no such view exists."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits if logits.dim() in (2, 3) else logits.reshape(-1, logits.shape[-1])


def overwritable(logits: Tensor) -> bool:
    """Whether each row has bytes of its own for its gradient, which those of an expanded tensor do not have."""
    rows_apart = logits.stride(-2) >= logits.shape[-1]
    if logits.dim() == 3 and logits.shape[0] > 1:
        rows_apart = rows_apart and logits.stride(0) >= logits.shape[1] * logits.stride(1)
    return checks.is_eager(logits) and rows_apart


def check_logits(logits: Tensor, ids: Tensor, temperature, softcap, logit_scale, mask) -> None:
    checks.floating("logits", logits, dims=tuple(range(1, 8)), what="[..., V]")
    rows = logits.shape[:-1]
    if logits.shape[-1] == 0:
        raise ValueError("logits: got an empty vocabulary, expected V >= 1")
    if mask is not None:
        checks.mask("mask", mask, like=logits, expected=rows, what="the shape of ids")
    checks.ids(ids, like=logits, expected=rows, vocabulary=logits.shape[-1], where=mask)
    checks.temperature(temperature, like=logits, expected=rows)
    checks.number("softcap", softcap, above=0, optional=True)
    checks.number("logit_scale", logit_scale, above=0)


def _forward(
    logits: Tensor,  # (N, V) or (B, T, V)
    ids: Tensor,  # (N,)
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = RowStats.empty(ids.numel(), ids.device)
    rows = _rows(logits, ids, mask, temperatures, temperature, softcap, logit_scale)
    kernels(backend).token_logprobs_forward(rows, stats)
    return stats.logprobs.clone(), stats.entropy.clone(), stats.buffer


def _fake(logits, ids, *_):
    n = ids.numel()
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (4, n)))


def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    stats: Tensor,  # (4, N)
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> Tensor:
    out = _native.empty(logits.shape, logits.dtype, logits.device)
    transform = temperatures, temperature, softcap, logit_scale
    _write_gradient(out, grad_logprobs, grad_entropy, stats, logits, ids, mask, *transform, backend)
    return out


def _fake_backward(grad_logprobs, grad_entropy, stats, logits, *transform):
    return logits.new_empty(logits.shape)


def _write_gradient(out, grad_logprobs, grad_entropy, stats, logits, *rest) -> None:
    *rows, backend = rest
    g, h = (None if x is None else x.float().contiguous() for x in (grad_logprobs, grad_entropy))
    kernels(backend).token_logprobs_backward(_rows(logits, *rows), RowStats(stats), out, g, h)


def _rows(logits, ids, mask, temperatures, temperature, softcap, logit_scale) -> LogitRows:
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    return LogitRows(logits, ids.contiguous(), transform, None if mask is None else mask.contiguous())


def _save(ctx, inputs, output) -> None:
    logits, ids, mask, temperatures, *scalars, ctx.inplace, backend = inputs
    ctx.scalars = *scalars, backend
    _, _, stats = output
    ctx.save_for_backward(stats, logits, ids, mask, temperatures)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_logprobs, grad_entropy, _):
    nothing = (None,) * 8
    if not ctx.needs_input_grad[0] or (grad_logprobs is None and grad_entropy is None):
        return None, *nothing
    stats, logits, *rest = ctx.saved_tensors
    if ctx.inplace and overwritable(logits):
        with torch.no_grad():
            _write_gradient(logits, grad_logprobs, grad_entropy, stats, logits, *rest, *ctx.scalars)
        # The version tells autograd that the logits are gone, so that a second use of them raises.
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), *nothing
    return _backward_op(grad_logprobs, grad_entropy, stats, logits, *rest, *ctx.scalars), *nothing


_backward_op = define(
    schema_of("token_logprobs_backward", _backward), run=_backward, fake=_fake_backward, backward=refuse
)
_op = define(schema_of("token_logprobs", _forward), run=_forward, fake=_fake, save=_save, backward=_differentiate)
