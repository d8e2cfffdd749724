"""Log-probs of given tokens and entropies, from hidden states."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..backend import define_record, kernels, refuse, resolve
from ..launch_args import (
    RowStats,
    TokenLogprobs,
    Transform,
    flatten,
    names_of,
    tensors_apart,
    tensors_back,
    unflatten,
)
from . import checks
from .head import HeadRows, Needs, Plan, given_pass, head_stats
from .head_inputs import HeadInputs, LowRank, Storage, check_head, dense, gradient_dtype, under_autocast
from .quantised_weight import QuantisedWeight


def linear_token_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor | QuantisedWeight,  # (V, H)
    ids: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    low_rank: LowRank | None = None,  # (..., R) and (V, R)
    temperature: float | Tensor = 1.0,  # or (...)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # (...), bool
    entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """Return log-probs and entropies of `ids` from hidden states, without [N, V] logits.

        logits = hidden @ weight.T + low_rank.states @ low_rank.weight.T + bias

    The results are those of `token_logprobs(logits, ids, ...)`, in float32 and of the shape of `ids`. They are
    differentiable in `hidden`, `weight`, `bias`, and both parts of `low_rank`, which is the term of an adapter. A
    `QuantisedWeight` is dequantised a tile of rows at a time, and has no gradient.

    The logits are computed in chunks of `chunk_tokens` rows (None: chosen from the sizes), and again in backward. On
    CPU the chunks have the rows with a True mask only. On a GPU they have all rows, because the host would have to wait
    for the number of True entries. The reference backend computes all logits at once.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit; on CPU also an id outside [0, V) with a True mask.
    """
    temperature = checks.constant(temperature)
    hidden, weight, bias, low_rank = under_autocast(hidden, weight, bias, low_rank)
    check_head(hidden, weight, ids, bias, low_rank, temperature, softcap, logit_scale, mask, chunk_tokens)
    chosen = resolve("linear_token_logprobs", backend, hidden, len(weight))
    if chosen == "reference":
        from .. import reference

        return reference.linear_token_logprobs(
            hidden,
            dense(weight, hidden.dtype),
            ids.long(),
            bias=bias,
            low_rank=low_rank,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            mask=mask,
            entropy=entropy,
        )
    inputs = Inputs(
        HeadInputs.of(hidden, weight, bias, low_rank),
        Storage.of(weight),
        ids.reshape(-1).long(),
        None if mask is None else mask.reshape(-1),
        Transform.of(temperature, softcap, logit_scale),
        chunk_tokens,
        chosen,
    )
    logprobs, h, _ = _op(*flatten(inputs))
    return TokenLogprobs(logprobs.view(ids.shape), h.view(ids.shape) if entropy else None)


class Inputs(NamedTuple):
    """The arguments of the registered op."""

    head: HeadInputs
    storage: Storage
    ids: Tensor  # (N,)
    mask: Tensor | None  # (N,)
    transform: Transform
    chunk_tokens: int | None
    backend: str

    def plan(self) -> Plan:
        """Return the plan of the loop over chunks."""
        n, vocab = self.ids.numel(), self.storage.vocabulary
        return Plan.of(n, vocab, self.head.hidden.dtype, self.backend, self.chunk_tokens, None)

    def rows(self, keep: Tensor | None) -> HeadRows:
        """Return the rows where `keep` (N,) is True, gathered if the plan is compact."""
        hidden, states = self.head.hidden, self.head.states
        return HeadRows.of(hidden, states, self.ids, self.transform, keep, gather=self.plan().compact)


class GradientInputs(NamedTuple):
    """The arguments of the registered op that computes the gradients."""

    grad_logprobs: Tensor | None  # (N,)
    grad_entropy: Tensor | None  # (N,)
    stats: Tensor  # (4, N)
    inputs: Inputs
    needs: list[bool]  # whether each of `HeadInputs` needs a gradient
    unrounded: list[bool]  # whether each of these gradients is float32


NAMES = names_of(Inputs)


def _forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.rows(x.mask)
    stats = head_stats(kernels(x.backend), x.storage.head(x.head), rows, x.plan())
    buffer = rows.spread(stats.buffer, x.ids.numel())
    return buffer[0].clone(), buffer[1].clone(), buffer


def _fake(x: Inputs) -> tuple[Tensor, ...]:
    n = x.ids.numel()
    return tuple(x.head.hidden.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (4, n)))


def _backward(x: GradientInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, n = x.inputs.head.hidden, x.inputs.ids.numel()
    g, h = (None if y is None else y.float() for y in (x.grad_logprobs, x.grad_entropy))
    live = cast(Tensor, sum(y.abs() for y in (g, h) if y is not None)) != 0  # at least one is given
    keep = live if x.inputs.mask is None else live & x.inputs.mask
    g, h = (None if y is None else torch.where(keep, y, 0) for y in (g, h))  # masked rows may be NaN
    rows = x.inputs.rows(keep)
    # Relative to the largest coefficient, because half-precision gradients of logits underflow for small coefficients.
    largest = torch.stack([y.abs().amax() for y in (g, h) if y is not None]).amax() if n else hidden.new_ones(())
    largest = torch.where(largest > 0, largest, 1).float()
    g, h = (None if y is None else rows.take(y) / largest for y in (g, h))
    kept = RowStats(x.stats if rows.index is None else x.stats[:, rows.index])
    launch, head = kernels(x.inputs.backend), x.inputs.storage.head(x.inputs.head)
    results = given_pass(launch, head, rows, kept, g, h, n, x.inputs.plan(), Needs(*x.needs))
    d_hidden, d_weight, d_bias, d_states, d_low_weight = (
        hidden.new_empty(0) if y is None else launch.scale_cast(y, largest, torch.float32 if wide else hidden.dtype)
        for y, wide in zip(results, x.unrounded, strict=True)
    )
    return d_hidden, d_weight, d_bias, d_states, d_low_weight


def _fake_backward(x: GradientInputs) -> tuple[Tensor, ...]:
    hidden = x.inputs.head.hidden
    wanted = zip(x.inputs.head, x.needs, x.unrounded, strict=True)
    return tuple(
        hidden.new_empty(y.shape if needed and y is not None else (0,), dtype=torch.float32 if wide else hidden.dtype)
        for y, needed, wide in wanted
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x = unflatten(Inputs, inputs)
    _, _, stats = output
    ctx.unrounded = [y is not None and gradient_dtype(y) is torch.float32 for y in x.head]
    tensors, ctx.rest = tensors_apart(inputs)
    ctx.save_for_backward(stats, *tensors)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradients: dict[str, Tensor | None] = dict.fromkeys(NAMES)
    needed = dict(zip(NAMES, ctx.needs_input_grad, strict=True))
    needs = [needed[name] for name in HeadInputs._fields]
    if not any(needs) or (grad_logprobs is None and grad_entropy is None):
        return tuple(gradients.values())
    stats, *tensors = ctx.saved_tensors
    inputs = unflatten(Inputs, tensors_back(tensors, ctx.rest))
    results = _backward_op(*flatten(GradientInputs(grad_logprobs, grad_entropy, stats, inputs, needs, ctx.unrounded)))
    gradients |= {name: g for name, g, need in zip(HeadInputs._fields, results, needs, strict=True) if need}
    return tuple(gradients.values())


_backward_op = define_record(
    "linear_token_logprobs_backward", GradientInputs, _backward, _fake_backward, backward=refuse
)
_op = define_record("linear_token_logprobs", Inputs, _forward, _fake, save=_save, backward=_differentiate)
