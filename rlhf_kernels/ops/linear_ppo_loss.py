# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Function.apply` and `Tensor.split`.
"""The PPO objective from hidden states: policy and value head with three matrix products and no [N, V] tensor."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .. import _native  # pyright: ignore[reportPrivateUsage]  # of this package
from .._options import PPOOptions
from ..backend import define_record, kernels, refuse, resolve
from ..launch_args import Denominators, PPOLoss, RowStats, Transform, flatten, names_of, unflatten
from . import checks, objective
from .agreement import agreed, local_parts, together
from .head import HeadGradients, HeadRows, Needs, Plan, Results, row_pass
from .linear_token_logprobs import HeadInputs, Storage, check_head, dense, gradient_dtype, stats_of, under_autocast
from .objective import ObjectiveTerms, as_loss
from .row_terms import tokens_of
from .sequence_pass import add_given, block_pass, sequence_pass
from .shards import WHOLE, Group, Shards
from .weights import LowRank, QuantisedWeight

VALUE_ROWS = 1024
"""Number of hidden states that the value head casts to float32 at a time."""


def linear_ppo_loss(
    hidden: Tensor,  # (B, T, H) or (N, H), differentiable
    weight: Tensor | QuantisedWeight,  # (V, H), differentiable
    ids: Tensor,  # (B, T) or (N,)
    old_logprobs: Tensor,  # (B, T) or (N,)
    advantages: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    bias: Tensor | None = None,  # (V,), differentiable
    low_rank: LowRank | None = None,  # (..., R) and (V, R), differentiable
    value_weight: Tensor | None = None,  # (H,), differentiable
    value_bias: Tensor | None = None,  # (), differentiable
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    compact: bool | None = None,
    backend: str = "auto",
    group: Group | None = None,  # torch.distributed.ProcessGroup
    **options: Unpack[PPOOptions],
) -> PPOLoss:
    """Return the PPO loss of a policy head and an optional value head, without [N, V] logits.

        logits = hidden @ weight.T + low_rank.states @ low_rank.weight.T + bias
        values = hidden @ value_weight + value_bias

    The loss is that of `logits_ppo_loss(logits, ids, ...)`, which includes the value term if there are values.
    `options` are the options of `ppo_loss` except `entropy`, which this op computes. Pass the option `values` for a
    separate value model; it excludes `value_weight`.

    `low_rank` is the term of an adapter on the output layer; `LowRank.lora` computes it from A and B. A
    `QuantisedWeight` is dequantised a tile of rows at a time, and has no gradient.

    The forward pass computes logits and gradients chunk by chunk, and backward scales the gradients in place. A second
    backward of one loss therefore raises RuntimeError. Under activation checkpointing this call gives the same
    gradients and does its work twice; leave it outside of the checkpointed region.

    Masked rows need no matrix product. Rows whose derivatives of the loss by log-prob and entropy are exactly zero
    (clipped, or with an advantage of 0) need no backward product. On CPU these rows are always left out of the
    products. On a GPU they are zeros in the products; `compact=True` leaves them out, but then the host waits for the
    device once per call and once per chunk, and the call cannot be captured in a CUDA graph. `chunk_tokens` is the
    number of rows per chunk (None: chosen from the sizes). `compact` and `chunk_tokens` change memory and time but no
    result; the reference backend computes all logits at once and ignores both.

    With a ratio per sequence, chunks are whole sequences. A sequence with more unmasked rows than a chunk
    (`head_workspace_bytes` has the sizes) needs a pass for its log-probs first: its rows cost a fourth product. So do all
    rows if the objective is a function, and, on a GPU without `compact`, all packed sequences, because the host does not
    know where they begin, and padded sequences that are longer than a chunk.

    The weight can be sharded by rows over the ranks of `group`, or be a DTensor; see `linear_token_logprobs`. Every rank
    returns the same loss and metrics, bit for bit. The value head is replicated: each rank computes the values of its part
    of the tokens.

    Source: as `ppo_loss`.

    Raises:
        ValueError: as `linear_token_logprobs` and `ppo_loss`; also `compact=True` while a CUDA graph is captured, and
            `compact=False` on CPU; ranks of `group` whose arguments differ.
        TypeError: an unknown option; the message names the nearest option.
    """
    temperature = checks.constant(temperature)
    args, op = objective.parse("linear_ppo_loss", options), "linear_ppo_loss"
    replicated: dict[str, Tensor | None] = {"hidden": hidden, "value_weight": value_weight, "value_bias": value_bias}
    weight, bias, low_rank, group = local_parts(op, weight, bias, low_rank, group, **replicated)
    hidden, weight, bias, low_rank = under_autocast(hidden, weight, bias, low_rank)

    def checked() -> str:
        transform, seen = (temperature, softcap, logit_scale), tokens_of(args.nll_mask, mask)
        check_head(hidden, weight, ids, bias, low_rank, *transform, seen, chunk_tokens, sharded=group is not None)
        computed = {"value_head": value_weight is not None, "computes_entropy": True}
        objective.check(args, ids, old_logprobs, advantages, mask, name="ids", **computed)
        check_value_head(hidden, value_weight, value_bias)
        if not (compact is None or compact is True or compact is False):
            raise ValueError(f"compact: got {compact!r}, expected None, True or False")
        return resolve(op, backend, hidden, len(weight))

    chosen = together(group, hidden, checked)
    seen = tokens_of(args.nll_mask, mask)
    values = None if args.values is None else args.values.float().reshape(-1)
    leaves = Leaves(HeadInputs.of(hidden, weight, bias, low_rank), value_weight, value_bias, values)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in flatten(leaves)]
    head: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    same = {"chunk_tokens": chunk_tokens, "compact": compact, "needs": needs, **head, **vars(args)}
    place = agreed(group, weight, hidden, ids, seen, chosen, same)
    if chosen == "reference":
        from .. import reference

        head |= {"bias": bias, "low_rank": low_rank, "value_weight": value_weight, "value_bias": value_bias}
        head |= objective.as_options(args, mask)
        given = hidden, dense(weight, hidden.dtype), ids.long(), old_logprobs, advantages, mask
        if group is not None:
            return reference.sharded_ppo_loss(*given, group=group, begin=place.begin, **head)
        return reference.linear_ppo_loss(*given, **head)
    storage, flat_ids, moved = (
        Storage.of(weight),
        ids.reshape(-1).long(),
        Transform.of(temperature, softcap, logit_scale),
    )
    stats = logprobs = None
    if callable(args.objective):
        stats = stats_of(leaves.head, storage, flat_ids, seen.reshape(-1), moved, chunk_tokens, chosen, place)
        logprobs = RowStats(stats).logprobs
    inputs = Inputs(
        leaves,
        needs,
        storage,
        flat_ids,
        moved,
        chunk_tokens,
        check_compact(compact, hidden, chosen),
        checks.flat(args.old_values),
        checks.flat(args.returns),
        ObjectiveTerms.of(args, old_logprobs, advantages, mask, logprobs),
        stats,
        chosen,
        place,
    )
    loss, metrics = LinearPpoLoss.apply(*flatten(inputs))
    return as_loss(loss, metrics, inputs.terms)


def check_compact(compact: bool | None, hidden: Tensor, backend: str) -> bool:
    """Return whether the products leave out masked rows and rows without a gradient; raise ValueError if not possible."""
    if backend == "cpu":
        if compact is False:
            raise ValueError("compact: got False, expected None or True: the CPU backend always leaves those rows out")
        return True
    if compact and hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "compact: got True while a CUDA graph is captured, expected None: compact waits for the device"
        )
    return bool(compact)


def check_value_head(hidden: Tensor, value_weight: Tensor | None, value_bias: Tensor | None) -> None:
    """Check the shapes, devices and dtypes of the value head's parameters."""
    if value_weight is not None:
        checks.tensor("value_weight", value_weight, like=hidden, expected=hidden.shape[-1:], what="[H]")
    if value_bias is not None:
        if value_weight is None:
            raise ValueError("value_bias is set but value_weight is not; pass both or neither")
        checks.tensor("value_bias", value_bias, like=hidden, expected=(), what="a scalar")


class Leaves(NamedTuple):
    """The differentiable inputs."""

    head: HeadInputs
    value_weight: Tensor | None  # (H,)
    value_bias: Tensor | None  # ()
    values: Tensor | None  # (N,)


LEAVES = names_of(Leaves)


class Inputs(NamedTuple):
    """The arguments of the registered op."""

    leaves: Leaves
    needs: list[bool]  # whether each of the leaves needs a gradient
    storage: Storage
    ids: Tensor  # (N,)
    transform: Transform
    chunk_tokens: int | None
    compact: bool
    old_values: Tensor | None  # (N,)
    returns: Tensor | None  # (N,)
    terms: ObjectiveTerms
    stats: Tensor | None  # (4, N), the statistics of the rows if they are known already
    backend: str
    shards: Shards = WHOLE

    def needed(self) -> dict[str, bool]:
        """Return whether each of the leaves needs a gradient, by name."""
        return dict(zip(LEAVES, self.needs, strict=True))

    def plan(self) -> Plan:
        """Return the plan of the loop over chunks."""
        dtype, vocab = self.leaves.head.hidden.dtype, self.shards.logits_rows(self.storage.vocabulary)
        return Plan.of(self.ids.numel(), vocab, dtype, self.backend, self.chunk_tokens, self.compact)


NAMES = names_of(Inputs)


def _forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    leaves, terms, needs, values = x.leaves, x.terms, x.needed(), x.leaves.values
    hidden, n, launch, plan = leaves.head.hidden, len(x.ids), x.shards.kernels(x.backend), x.plan()
    ids, own = x.shards.local(x.ids), x.shards.own_rows(n)
    head, needs_head = x.storage.head(leaves.head), Needs(*(needs[name] for name in Needs._fields))
    gradients = HeadGradients(launch, head, n, plan, needs_head)

    def take(keep: Tensor) -> HeadRows:
        return HeadRows.of(hidden, leaves.head.states, ids, x.transform, keep, gather=plan.compact)

    if leaves.value_weight is not None:
        values = value_forward(hidden[own], leaves.value_weight, leaves.value_bias, terms.value_mask[own])
        values = x.shards.gathered(values, own, n)
    if x.stats is not None:
        stats = RowStats(x.stats)
    elif terms.sequence_level:
        stats = sequence_pass(gradients, take, terms)
    elif terms.others.present:
        stats = block_pass(gradients, take, terms)
    else:
        rows = take(terms.mask)
        stats = RowStats(rows.spread(row_pass(gradients, rows, terms.ppo).buffer, n))
    targets = [None if y is None else y.contiguous() for y in (values, x.old_values, x.returns)]
    slope, value_slope, sums = terms.sums(launch, stats.logprobs, stats.entropy, *targets)
    if x.stats is not None and any(gradients.needs):
        add_given(gradients, take, terms, stats, slope, terms.tokens)
    results = gradients.results()
    if any(gradients.needs) and _leaves_half_range(x, slope):
        # Again, relative to the largest slope; the sums of the products are float32.
        gradients, largest = HeadGradients(launch, head, n, plan, needs_head), _largest(terms, slope)
        add_given(gradients, take, terms, stats, slope, terms.tokens, largest)
        results = Results(*(None if y is None else y * largest for y in gradients.results()))
    of_values = _value_backward(leaves, value_slope, results.hidden, terms, needs, own)
    x.shards.sum_(results.hidden, results.states, of_values[0])
    all_gradients = (*results, *of_values)
    d_hidden, d_weight, d_bias, d_states, d_low_weight, d_value_weight, d_value_bias, d_values = (
        hidden.new_empty(0) if g is None else g for g in all_gradients
    )
    of_head = d_hidden, d_weight, d_bias, d_states, d_low_weight
    loss = terms.loss(sums, valued=values is not None)
    return loss, terms.metrics(sums), *of_head, d_value_weight, d_value_bias, d_values


_HALF_SLOPES = 2.0**-6, 2.0**12
"""Largest slopes of a batch for which float16 holds the gradients of the logits."""


def _leaves_half_range(x: Inputs, slope: Tensor) -> bool:
    """Return whether slopes of the tokens give gradients of logits that float16 cannot hold before they are divided.

    Only on the CPU: on a GPU the answer would need a synchronization. There advantages above 65504 give gradients that are not
    finite.
    """
    if x.backend != "cpu" or x.leaves.head.hidden.dtype != torch.float16:
        return False
    largest = float(_largest(x.terms, slope))
    return not _HALF_SLOPES[0] <= largest <= _HALF_SLOPES[1] and 0 < largest < torch.inf


def _largest(terms: ObjectiveTerms, slope: Tensor) -> Tensor:
    """Return the largest slope of a token of any term, and of its entropy."""
    entropy_slope = terms.entropy_slope()
    size = slope.abs() if entropy_slope is None else torch.maximum(slope.abs(), entropy_slope.abs())
    return torch.where(terms.tokens, size, 0).amax() if size.numel() else size.new_zeros(())


def value_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """Return `hidden @ weight + bias` in float32, (N,). Hidden states of masked rows are replaced by zeros."""
    w = weight.float()
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round this product
        values = torch.cat([rows @ w for rows in _float_rows(hidden, mask)]) if len(hidden) else w.new_empty(0)
    return values if bias is None else values + bias.float()


def _float_rows(hidden: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """Yield `VALUE_ROWS` hidden states at a time, in float32 and with zeros where the mask is False."""
    for rows, counts in zip(hidden.split(VALUE_ROWS), mask.split(VALUE_ROWS), strict=True):
        yield torch.where(counts[:, None], rows, 0).float()


def _value_backward(
    leaves: Leaves, slope: Tensor, d_hidden: Tensor | None, terms: ObjectiveTerms, needs: dict[str, bool], own: slice
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of value weight, value bias and values; add the value head's gradient to `d_hidden`.

    `d_hidden` is divided by the policy's denominator in backward, so the value head's gradient is multiplied by it
    here. The first two are computed for the tokens `own` of this rank.
    """
    hidden, weight, d = leaves.head.hidden[own], leaves.value_weight, terms.denominators
    slope = slope * (terms.vf_coef / d.value)
    if weight is None:
        return None, None, slope if needs["values"] else None
    if d_hidden is not None:
        d_hidden[own].addr_(slope[own] * d.policy, weight.float())
    d_weight = None
    if needs["value_weight"]:
        pieces = zip(slope[own].split(VALUE_ROWS), _float_rows(hidden, terms.value_mask[own]), strict=True)
        with torch.autocast(hidden.device.type, enabled=False):
            d_weight = sum((s @ h for s, h in pieces), torch.zeros(len(weight), device=weight.device))
    return d_weight, slope.double().sum().float() if needs["value_bias"] else None, None


def _fake(x: Inputs) -> tuple[Tensor, ...]:
    hidden, f32, needs = x.leaves.head.hidden, torch.float32, x.needed()
    gradients = [
        hidden.new_empty(leaf.shape if needs[name] else (0,), dtype=x.plan().sum_dtype if name == "weight" else f32)
        for name, leaf in zip(LEAVES, flatten(x.leaves), strict=True)
    ]
    return hidden.new_empty((), dtype=f32), hidden.new_empty(x.terms.num_metrics, dtype=f32), *gradients


class LinearPpoLoss(torch.autograd.Function):
    """Autograd function that computes the gradients in forward and scales them by the upstream gradient in backward."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and the metrics; save the gradients."""
        inputs = unflatten(Inputs, flat)
        loss, metrics, *gradients = _op(*flat)
        denominators = inputs.terms.stacked_denominators
        save_gradients(ctx, flatten(inputs.leaves), inputs.needs, inputs.backend, denominators, gradients, metrics)
        return loss, metrics

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one gradient per output
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the saved gradients, scaled by the upstream gradient."""
        return scaled_gradients(ctx, grad_loss, "linear_ppo_loss", NAMES, LEAVES, lambda x: Denominators(*x).policy)


def save_gradients(
    ctx: Any, leaves: Iterable[Tensor | None], needs: list[bool], backend: str, denominators: Tensor,
    gradients: list[Tensor], constant: Tensor,
) -> None:  # fmt: skip
    """Save in forward what `scaled_gradients` reads; `constant` is the result that has no gradient."""
    ctx.needs, ctx.backend = needs, backend
    ctx.save_for_backward(denominators, *gradients)
    pairs = zip(leaves, needs, strict=True)
    ctx.dtypes = [gradient_dtype(x) if needed and x is not None else None for x, needed in pairs]
    ctx.mark_non_differentiable(constant)
    ctx.set_materialize_grads(False)


def scaled_gradients(
    ctx: Any, grad_loss: Tensor | None, op: str, names: Iterable[str], leaves: Iterable[str],
    denominator: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the saved gradients in backward, scaled by the upstream gradient; None for inputs other than `leaves`.

    The gradients of the head's inputs are also divided by `denominator` of the saved denominators.
    """
    results: dict[str, Tensor | None] = dict.fromkeys(names)
    if grad_loss is None:
        return tuple(results.values())
    if checks.is_eager(grad_loss):
        if torch.is_grad_enabled():
            refuse(ctx)  # create_graph=True: the gradients are constants
        checks.first_backward(ctx, op)
    denominators, *gradients = ctx.saved_tensors
    of_head = grad_loss / denominator(denominators)
    for name, gradient, dtype, needed in zip(leaves, gradients, ctx.dtypes, ctx.needs, strict=True):
        if needed:
            results[name] = scaled(gradient, of_head if name in HeadInputs._fields else grad_loss, dtype, ctx.backend)
    return tuple(results.values())


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Return `gradient * scale`, rounded once to `dtype`; computed in place if possible."""
    if not checks.is_eager(gradient) or dtype not in _native.DTYPES:
        return (gradient.float() * scale).to(dtype)
    with torch.no_grad():
        result = kernels(backend).scale_cast(gradient, scale.float(), dtype)
    torch.autograd.graph.increment_version(gradient)
    return result


_op = define_record("linear_ppo_loss", Inputs, _forward, _fake)
