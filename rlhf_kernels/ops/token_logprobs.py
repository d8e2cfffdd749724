"""Log-probs of given tokens and entropies, from logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native  # pyright: ignore[reportPrivateUsage]  # of this package
from ..backend import define_record, kernels, refuse, resolve
from ..launch_args import LogitRows, RowStats, TokenLogprobs, Transform, flatten, names_of, unflatten
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
    """Return the log-probs of `ids`, and the entropies if `entropy=True`.

        log p(ids) = z[ids] - logsumexp(z),   H = -Σ p log p

    where `z = softcap * tanh(logit_scale * logits / softcap) / temperature` (no tanh if `softcap` is None) and p =
    softmax(z). Both results are in nats, in float32, of the shape of `ids`, and differentiable in `logits`. Where
    `mask` is False both are 0, the logits are ignored and their gradient is 0.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit; on CPU also an id outside [0, V) with a True mask.
    """
    temperature = checks.constant(temperature)
    check_logits(logits, ids, temperature, softcap, logit_scale, mask)
    chosen = resolve("token_logprobs", backend, logits, logits.shape[-1])
    if chosen == "reference":
        from .. import reference

        return reference.token_logprobs(
            logits,
            ids.long(),
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            mask=mask,
            entropy=entropy,
        )
    transform = Transform.of(temperature, softcap, logit_scale)
    return fused_token_logprobs(logits, ids, transform, mask, chosen, entropy=entropy)


class Inputs(NamedTuple):
    """The arguments of the registered op."""

    logits: Tensor  # (N, V) or (B, T, V)
    ids: Tensor  # (N,)
    mask: Tensor | None
    transform: Transform
    inplace: bool
    backend: str

    def rows(self) -> LogitRows:
        """Return the rows of logits as the kernels expect them."""
        mask = None if self.mask is None else self.mask.contiguous()
        return LogitRows(self.logits, self.ids.contiguous(), self.transform, mask)


class GradientInputs(NamedTuple):
    """The arguments of the registered op that computes the gradient."""

    grad_logprobs: Tensor | None  # (N,)
    grad_entropy: Tensor | None  # (N,)
    stats: Tensor  # (4, N)
    inputs: Inputs


NAMES = names_of(Inputs)


def fused_token_logprobs(
    logits: Tensor,
    ids: Tensor,
    transform: Transform,
    mask: Tensor | None,
    backend: str,
    *,
    entropy: bool,
    inplace: bool = False,
) -> TokenLogprobs:
    """Return log-probs and entropies, computed by compiled kernels from checked arguments."""
    flat_mask = None if mask is None else mask.reshape(-1)
    inputs = Inputs(as_rows(logits), ids.reshape(-1).long(), flat_mask, transform, inplace, backend)
    logprobs, h, _ = _op(*flatten(inputs))
    return TokenLogprobs(logprobs.view(ids.shape), h.view(ids.shape) if entropy else None)


def as_rows(logits: Tensor) -> Tensor:
    """Return the logits as (N, V) or (B, T, V) with unit stride along V, as a view if possible."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits if logits.dim() in (2, 3) else logits.reshape(-1, logits.shape[-1])


def overwritable(logits: Tensor) -> bool:
    """Return whether a gradient can be written over the logits: rows do not overlap in memory, as in an expanded tensor."""
    rows_apart = logits.stride(-2) >= logits.shape[-1]
    if logits.dim() == 3 and logits.shape[0] > 1:
        rows_apart = rows_apart and logits.stride(0) >= logits.shape[1] * logits.stride(1)
    return checks.is_eager(logits) and rows_apart


def check_logits(
    logits: Tensor,
    ids: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None,
) -> None:
    """Check the arguments of `token_logprobs`, which `logits_ppo_loss` also has."""
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


def _forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    stats = RowStats.empty(x.ids.numel(), x.ids.device)
    kernels(x.backend).token_logprobs_forward(x.rows(), stats)
    return stats.logprobs.clone(), stats.entropy.clone(), stats.buffer


def _fake(x: Inputs) -> tuple[Tensor, ...]:
    n = x.ids.numel()
    return tuple(x.logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (4, n)))


def _backward(x: GradientInputs) -> Tensor:
    logits = x.inputs.logits
    out = _native.empty(logits.shape, logits.dtype, logits.device)
    _write_gradient(out, x)
    return out


def _fake_backward(x: GradientInputs) -> Tensor:
    return x.inputs.logits.new_empty(x.inputs.logits.shape)


def _write_gradient(out: Tensor, x: GradientInputs) -> None:
    g, h = (None if y is None else y.float().contiguous() for y in (x.grad_logprobs, x.grad_entropy))
    kernels(x.inputs.backend).token_logprobs_backward(x.inputs.rows(), RowStats(x.stats), out, g, h)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x = unflatten(Inputs, inputs)
    _, _, stats = output
    ctx.save_for_backward(stats, x.logits, x.ids, x.mask, x.transform.temperatures)
    ctx.scalars = x._replace(logits=None, ids=None, mask=None, transform=x.transform._replace(temperatures=None))
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradients: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    of_logits = dict(zip(NAMES, ctx.needs_input_grad, strict=True))["logits"]
    if not of_logits or (grad_logprobs is None and grad_entropy is None):
        return tuple(gradients.values())
    stats, logits, ids, mask, temperatures = ctx.saved_tensors
    transform = ctx.scalars.transform._replace(temperatures=temperatures)
    inputs = ctx.scalars._replace(logits=logits, ids=ids, mask=mask, transform=transform)
    x = GradientInputs(grad_logprobs, grad_entropy, stats, inputs)
    if inputs.inplace and overwritable(logits):
        with torch.no_grad():
            _write_gradient(logits, x)
        # With a new version, autograd raises if a different op needs the overwritten logits.
        torch.autograd.graph.increment_version(logits)
        gradients["logits"] = logits.detach()
    else:
        gradients["logits"] = _backward_op(*flatten(x))
    return tuple(gradients.values())


_backward_op = define_record("token_logprobs_backward", GradientInputs, _backward, _fake_backward, backward=refuse)
_op = define_record("token_logprobs", Inputs, _forward, _fake, save=_save, backward=_differentiate)
