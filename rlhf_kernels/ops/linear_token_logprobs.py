"""Log-probs of given tokens and entropies, from hidden states; the inputs of the head and their checks.

Legend: N tokens, V vocabulary, H hidden, R rank of the low-rank term.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..backend import define_record, refuse, resolve
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
from .agreement import agreed, local_parts, together
from .head import HeadRows, Needs, Plan, given_epilogue, head_gradients, head_stats
from .shards import WHOLE, Group, Shards
from .weights import Head, LowRank, QuantisedWeight


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
    group: Group | None = None,  # torch.distributed.ProcessGroup
) -> TokenLogprobs:
    """Return log-probs and entropies of `ids` from hidden states, without [N, V] logits.

        logits = hidden @ weight.T + low_rank.states @ low_rank.weight.T + bias

    The results are those of `token_logprobs(logits, ids, ...)`, in float32 and of the shape of `ids`. They are
    differentiable in `hidden`, `weight`, `bias`, and both parts of `low_rank`, which is the term of an adapter. A
    `QuantisedWeight` is dequantised a tile of rows at a time, and has no gradient.

    The logits are computed in chunks of `chunk_tokens` rows (None: chosen from the sizes), and again in backward. On
    CPU the chunks have the rows with a True mask only. On a GPU they have all rows, because the host would have to wait
    for the number of True entries. The reference backend computes all logits at once.

    The weight can be sharded by rows over the ranks of a process group: pass each rank's rows of `weight`, `bias` and
    `low_rank.weight` with `group`, or a DTensor with the placement Shard(0) on a mesh of one dimension. The ids of a
    rank follow those of the ranks before it. All other arguments are replicated, every rank returns the same bits, and
    backward sums the gradients of `hidden` and `low_rank.states` over the ranks.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit; on CPU also an id outside [0, V) with a True mask;
            ranks of `group` whose arguments differ.
    """
    temperature = checks.constant(temperature)
    op = "linear_token_logprobs"
    weight, bias, low_rank, group = local_parts(op, weight, bias, low_rank, group, hidden=hidden)
    hidden, weight, bias, low_rank = under_autocast(hidden, weight, bias, low_rank)

    def checked() -> str:
        transform = temperature, softcap, logit_scale
        check_head(hidden, weight, ids, bias, low_rank, *transform, mask, chunk_tokens, sharded=group is not None)
        return resolve(op, backend, hidden, len(weight))

    chosen = together(group, hidden, checked)
    transform: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    given = {"entropy": entropy, "bias": bias is None, "low_rank": low_rank is None, "grad": hidden.requires_grad}
    same = {"chunk_tokens": chunk_tokens, **transform, **given}
    place = agreed(group, weight, hidden, ids, mask, chosen, same)
    if chosen == "reference":
        from .. import reference

        head: dict[str, Any] = {"bias": bias, "low_rank": low_rank, "mask": mask, "entropy": entropy, **transform}
        matrix = dense(weight, hidden.dtype)
        if group is not None:
            return reference.sharded_token_logprobs(hidden, matrix, ids.long(), group=group, begin=place.begin, **head)
        return reference.linear_token_logprobs(hidden, matrix, ids.long(), **head)
    inputs = Inputs(
        HeadInputs.of(hidden, weight, bias, low_rank),
        Storage.of(weight),
        ids.reshape(-1).long(),
        None if mask is None else mask.reshape(-1),
        Transform.of(temperature, softcap, logit_scale),
        chunk_tokens,
        chosen,
        place,
    )
    logprobs, h, _ = _op(*flatten(inputs))
    return TokenLogprobs(logprobs.view(ids.shape), h.view(ids.shape) if entropy else None)


def stats_of(
    head: "HeadInputs",
    storage: "Storage",
    ids: Tensor,  # (N,)
    mask: Tensor,  # (N,)
    transform: Transform,
    chunk_tokens: int | None,
    backend: str,
    place: Shards = WHOLE,
) -> Tensor:
    """Return the statistics of all rows (4, N), as constants, from checked arguments; see `RowStats`."""
    with torch.no_grad():
        return _op(*flatten(Inputs(head, storage, ids, mask, transform, chunk_tokens, backend, place)))[2]


class HeadInputs(NamedTuple):
    """The inputs of the head that can need a gradient, flat."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H), or the values of a quantised weight
    bias: Tensor | None  # (V,)
    states: Tensor | None  # (N, R)
    low_weight: Tensor | None  # (V, R)

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor | QuantisedWeight, bias: Tensor | None, low_rank: LowRank | None
    ) -> "HeadInputs":
        """Return the record of checked arguments."""
        states, low_weight = (None, None) if low_rank is None else low_rank
        return cls(
            hidden.reshape(-1, hidden.shape[-1]),
            weight if isinstance(weight, Tensor) else weight.values,
            bias,
            None if states is None else states.reshape(-1, states.shape[-1]),
            low_weight,
        )


class Storage(NamedTuple):
    """How the weight is stored: the fields of `QuantisedWeight` other than its values, or no scales."""

    vocabulary: int
    scales: Tensor | None  # None: floating point
    block: int

    @classmethod
    def of(cls, weight: Tensor | QuantisedWeight) -> "Storage":
        """Return the storage of `weight`."""
        if isinstance(weight, Tensor):
            return cls(weight.shape[0], None, 0)
        return cls(len(weight), weight.scales, weight.block)

    def head(self, x: HeadInputs) -> Head:
        """Return the head whose weight is stored in this way."""
        weight = x.weight
        if self.scales is not None:
            weight = QuantisedWeight(weight, self.scales, (self.vocabulary, x.hidden.shape[1]), self.block)
        return Head(weight, x.bias, x.low_weight)


class Inputs(NamedTuple):
    """The arguments of the registered op."""

    head: HeadInputs
    storage: Storage
    ids: Tensor  # (N,)
    mask: Tensor | None  # (N,)
    transform: Transform
    chunk_tokens: int | None
    backend: str
    shards: Shards = WHOLE

    def plan(self) -> Plan:
        """Return the plan of the loop over chunks."""
        n, vocab = self.ids.numel(), self.shards.logits_rows(self.storage.vocabulary)
        return Plan.of(n, vocab, self.head.hidden.dtype, self.backend, self.chunk_tokens, None)

    def rows(self, keep: Tensor | None) -> HeadRows:
        """Return the rows where `keep` (N,) is True, gathered if the plan is compact."""
        hidden, states = self.head.hidden, self.head.states
        ids = self.shards.local(self.ids)
        return HeadRows.of(hidden, states, ids, self.transform, keep, gather=self.plan().compact)


class GradientInputs(NamedTuple):
    """The arguments of the registered op that computes the gradients."""

    grad_logprobs: Tensor | None  # (N,)
    grad_entropy: Tensor | None  # (N,)
    stats: Tensor  # (4, N)
    inputs: Inputs
    needs: list[bool]  # whether each of `HeadInputs` needs a gradient
    unrounded: list[bool]  # whether each of these gradients is float32


NAMES = names_of(Inputs)


def under_autocast(
    hidden: Tensor, weight: Tensor | QuantisedWeight, bias: Tensor | None, low_rank: LowRank | None
) -> tuple[Tensor, Tensor | QuantisedWeight, Tensor | None, LowRank | None]:
    """Return the head's inputs in autocast's dtype if autocast is enabled, as `torch.nn.functional.linear` does.

    float64 stays float64, and a quantised weight is not changed.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias, low_rank
    dtype = torch.get_autocast_dtype(device)
    return (
        hidden.to(dtype),
        weight.to(dtype) if isinstance(weight, Tensor) else weight,
        None if bias is None else bias.to(dtype),
        None if low_rank is None else LowRank(low_rank[0].to(dtype), low_rank[1].to(dtype)),
    )


def check_head(
    hidden: Tensor,
    weight: Tensor | QuantisedWeight,
    ids: Tensor,
    bias: Tensor | None,
    low_rank: LowRank | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None,
    chunk_tokens: int | None,
    *,
    sharded: bool = False,
) -> None:
    """Check the arguments of `linear_token_logprobs`, which `linear_ppo_loss` also has.

    If the weight is `sharded`, the range of the ids is checked later, by `agreed`.
    """
    checks.floating("hidden", hidden, dims=tuple(range(1, 8)), what="[..., H]")
    rows = hidden.shape[:-1]
    v = _check_weight(weight, hidden)
    if bias is not None:
        checks.tensor("bias", bias, like=hidden, expected=(v,), what="[V]", dtypes=(hidden.dtype,))
    if low_rank is not None:
        _check_low_rank(low_rank, hidden, v)
    if mask is not None:
        checks.mask("mask", mask, like=hidden, expected=rows, what="the shape of ids")
    if sharded:
        checks.integers("ids", ids, like=hidden, expected=rows, what="one id per token")
    else:
        checks.ids(ids, like=hidden, expected=rows, vocabulary=v, where=mask)
    checks.temperature(temperature, like=hidden, expected=rows)
    checks.number("softcap", softcap, above=0, optional=True)
    checks.number("logit_scale", logit_scale, above=0)
    checks.number("chunk_tokens", chunk_tokens, least=1, optional=True, integer=True)


def _check_weight(weight: Tensor | QuantisedWeight, hidden: Tensor) -> int:
    """Check the weight, and return the size of the vocabulary."""
    h = hidden.shape[-1]
    if isinstance(weight, QuantisedWeight):
        if weight.shape[1] != h:
            raise ValueError(f"weight: got shape {weight.shape}, expected {(len(weight), h)} = [V, H]")
        if weight.device != hidden.device:
            raise ValueError(f"weight: got device {weight.device}, expected {hidden.device}")
        return len(weight)
    checks.floating("weight", weight, dims=(2,), what="[V, H]")
    v = weight.shape[0]
    checks.tensor("weight", weight, like=hidden, expected=(v, h), what="[V, H]", dtypes=(hidden.dtype,))
    if v == 0 or h == 0:
        raise ValueError(f"weight: got shape {checks.shape(weight)}, expected V >= 1 and H >= 1")
    return v


def _check_low_rank(low_rank: LowRank, hidden: Tensor, v: int) -> None:
    if not isinstance(low_rank, tuple) or len(low_rank) != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"low_rank: got {type(low_rank).__name__}, expected LowRank(states, weight)")
    states, weight = low_rank
    checks.floating("low_rank.weight", weight, dims=(2,), what="[V, R]")
    r, dtypes = weight.shape[1], (hidden.dtype,)
    checks.tensor("low_rank.weight", weight, like=hidden, expected=(v, r), what="[V, R]", dtypes=dtypes)
    if r == 0:
        raise ValueError(f"low_rank.weight: got shape {checks.shape(weight)}, expected R >= 1")
    expected = (*hidden.shape[:-1], r)
    checks.tensor("low_rank.states", states, like=hidden, expected=expected, what="[..., R]", dtypes=dtypes)


def gradient_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the gradient of `x`: `x.grad_dtype` if set, which is not known in a compiled graph."""
    return (x.grad_dtype if checks.is_eager(x) and x.is_leaf else None) or x.dtype


def dense(weight: Tensor | QuantisedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight (V, H) as a tensor, for the reference."""
    return weight if isinstance(weight, Tensor) else weight.dequantised(dtype)


def _forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.rows(x.mask)
    stats = head_stats(x.shards.kernels(x.backend), x.storage.head(x.head), rows, x.plan())
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
    launch, head = x.inputs.shards.kernels(x.inputs.backend), x.inputs.storage.head(x.inputs.head)
    epilogue = given_epilogue(launch, kept, g, h)
    results = head_gradients(launch, head, rows, n, x.inputs.plan(), Needs(*x.needs), epilogue)
    x.inputs.shards.sum_(results.hidden, results.states)
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
