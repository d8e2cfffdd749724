# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Function.apply`.
"""Distillation from the teacher's most probable tokens, from hidden states, without an [N, V] tensor.

Legend: N tokens, V vocabulary, H hidden, K tokens that the teacher lists, R rank of the low-rank term.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import define_record, kernels, resolve
from ..launch_args import LogitRows, Transform, flatten, names_of, unflatten
from ..token_args import DIRECTIONS, TAILS, TopkKL, TopkRows, TopkRule
from . import checks, objective
from .agreement import refuse_dtensors
from .head import HeadRows, Needs, Plan, head_gradients
from .linear_ppo_loss import check_compact, save_gradients, scaled_gradients
from .linear_token_logprobs import HeadInputs, Storage, check_head, dense, under_autocast
from .weights import LowRank, QuantisedWeight


def linear_topk_kl(
    hidden: Tensor,  # (B, T, H) or (N, H), differentiable
    weight: Tensor | QuantisedWeight,  # (V, H), differentiable
    teacher_ids: Tensor,  # (B, T, K) or (N, K)
    teacher_logprobs: Tensor,  # (B, T, K) or (N, K)
    mask: Tensor,  # (B, T) or (N,), bool
    *,
    direction: str = "forward",
    tail: str = "drop",
    beta: float = 0.5,
    weights: Tensor | None = None,  # (B, T) or (N,)
    num_tokens: float | Tensor | None = None,
    bias: Tensor | None = None,  # (V,), differentiable
    low_rank: LowRank | None = None,  # (..., R) and (V, R), differentiable
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    compact: bool | None = None,
    backend: str = "auto",
) -> TopkKL:
    """Return the mean divergence between a student and the K tokens that a teacher lists at each position.

        loss = Σ_t weights_t D_t / num_tokens,   D_t = Σ_k d(q_k, p_k) [+ d(1 - Σ_k q_k, 1 - Σ_k p_k)]

        forward:  d(q, p) = p log(p / q)                                    KL(teacher || student)
        reverse:  d(q, p) = q log(q / p)                                    KL(student || teacher)
        jsd:      d(q, p) = beta p log(p / m) + (1 - beta) q log(q / m),    m = beta p + (1 - beta) q

    where q are probabilities of the student, the softmax of the logits of `linear_token_logprobs` over the whole
    vocabulary, and p = exp(teacher_logprobs). The sum over t has the tokens where `mask` is True. The teacher's
    log-probs are used as they are: compute them over its whole vocabulary, at the temperature that you want.
    `num_tokens` (None: the True tokens of this call) divides the loss, so that with the number of the full batch, the
    losses and gradients of micro-batches add up; other means are weights with `num_tokens=1`.

    `tail="drop"` leaves out the tokens that the teacher does not list. "lump" adds the bracketed term, which counts
    them as one token; each of its two probabilities is at least 1e-7. Without it, the student can gain by mass outside
    of the list ("reverse"), and D can be negative.

    An entry with a teacher log-prob of -inf is unused, and its id can be anything, so rows can have fewer than K
    tokens. The ids of a row should differ: an id that is listed twice counts as two tokens with the same probability q.

    The loss is differentiable in `hidden`, `weight`, `bias` and both parts of `low_rank`. `kl` (D), `student_mass`
    (Σ q) and `teacher_mass` (Σ p) are per token and detached. Three matrix products are computed in chunks of rows, as
    those of `linear_ppo_loss`, whose notes on backward, checkpointing, `compact` and `chunk_tokens` hold here; rows
    with a weight of 0 are left out of the backward products.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Agarwal et al. 2024, "On-Policy
    Distillation of Language Models" (GKD), eq. 1.

    Raises:
        ValueError: as `linear_token_logprobs`; also K above V, and on a CPU an id outside [0, V) of a used entry with a
            True mask; on CUDA such an id gives NaN for its row. An option that the direction does not read.
    """
    temperature = checks.constant(temperature)
    refuse_dtensors("linear_topk_kl", hidden=hidden, weight=weight, bias=bias)
    hidden, weight, bias, low_rank = under_autocast(hidden, weight, bias, low_rank)
    _check(hidden, weight, teacher_ids, teacher_logprobs, mask, direction, tail, beta, weights, num_tokens)
    ids = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)  # the head's kernels read one per row
    check_head(hidden, weight, ids, bias, low_rank, temperature, softcap, logit_scale, mask, chunk_tokens)
    chosen = resolve("linear_topk_kl", backend, hidden, len(weight))
    if chosen == "reference":
        from .. import reference

        return reference.linear_topk_kl(
            hidden,
            dense(weight, hidden.dtype),
            teacher_ids.long(),
            checks.wide(teacher_logprobs),
            mask,
            direction=direction,
            tail=tail,
            beta=beta,
            weights=checks.wide(weights),
            num_tokens=num_tokens,
            bias=bias,
            low_rank=low_rank,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
        )
    k, flat_mask = teacher_ids.shape[-1], mask.reshape(-1).contiguous()
    leaves = HeadInputs.of(hidden, weight, bias, low_rank)
    inputs = Inputs(
        leaves,
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves],
        Storage.of(weight),
        ids.reshape(-1),
        teacher_ids.reshape(-1, k).long().contiguous(),
        teacher_logprobs.detach().reshape(-1, k).float().contiguous(),
        flat_mask,
        checks.flat(weights),
        objective.count(flat_mask, num_tokens),
        Transform.of(temperature, softcap, logit_scale),
        TopkRule(DIRECTIONS.index(direction), tail == "lump", float(beta)),
        chunk_tokens,
        check_compact(compact, hidden, chosen),
        chosen,
    )
    loss, found = LinearTopkKL.apply(*flatten(inputs))
    return TopkKL(loss, *(x.view(mask.shape) for x in found.detach().unbind()))


def _check(
    hidden: Tensor,
    weight: Tensor | QuantisedWeight,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    direction: str,
    tail: str,
    beta: float,
    weights: Tensor | None,
    num_tokens: float | Tensor | None,
) -> None:
    """Check the arguments that are not those of `check_head`."""
    checks.floating("hidden", hidden, dims=(2, 3), what="[B, T, H] or [N, H]")
    checks.choice("direction", direction, DIRECTIONS)
    checks.choice("tail", tail, TAILS)
    checks.number("beta", beta, above=0, most=1)
    if beta == 1 or (direction != "jsd" and beta != 0.5):
        wanted = "a number below 1" if beta == 1 else f"0.5 with direction={direction!r}, which does not read it"
        raise ValueError(f"beta: got {beta}, expected {wanted}")
    rows, v = hidden.shape[:-1], len(weight)
    if not isinstance(teacher_ids, Tensor) or teacher_ids.dim() != hidden.dim():  # pyright: ignore[reportUnnecessaryIsInstance]
        got = checks.shape(teacher_ids) if isinstance(teacher_ids, Tensor) else type(teacher_ids).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"teacher_ids: got {got}, expected a tensor of shape [..., K], like hidden")
    k = teacher_ids.shape[-1]
    checks.integers("teacher_ids", teacher_ids, like=hidden, expected=(*rows, k), what="K ids per token")
    if not 0 < k <= v:
        raise ValueError(f"teacher_ids: got K = {k} ids per token, expected 1 to {v}, the vocabulary of weight")
    checks.tensor(
        "teacher_logprobs", teacher_logprobs, like=hidden, expected=(*rows, k), what="the shape of teacher_ids"
    )
    checks.mask("mask", mask, like=hidden, expected=rows, what="the token shape of hidden")
    if weights is not None:
        checks.tensor("weights", weights, like=hidden, expected=rows, what="the token shape of hidden")
    checks.denominator("num_tokens", num_tokens)
    if checks.values_visible(teacher_ids):
        outside = ((teacher_ids < 0) | (teacher_ids >= v)) & mask[..., None] & (teacher_logprobs != -torch.inf)
        if bool(outside.any()):
            raise ValueError(
                f"teacher_ids: got {teacher_ids[outside][0].item()}, expected ids in [0, {v}) wherever the mask is True and "
                "the teacher's log-prob is not -inf"
            )


class Inputs(NamedTuple):
    """The arguments of the registered op."""

    leaves: HeadInputs
    needs: list[bool]  # whether each of the leaves needs a gradient
    storage: Storage
    ids: Tensor  # (N,), not read
    teacher_ids: Tensor  # (N, K)
    teacher_logprobs: Tensor  # (N, K)
    mask: Tensor  # (N,)
    weights: Tensor | None  # (N,)
    denominator: Tensor  # ()
    transform: Transform
    rule: TopkRule
    chunk_tokens: int | None
    compact: bool
    backend: str

    def plan(self) -> Plan:
        """Return the plan of the loop over chunks."""
        n, vocab = self.ids.numel(), self.storage.vocabulary
        return Plan.of(n, vocab, self.leaves.hidden.dtype, self.backend, self.chunk_tokens, self.compact)


NAMES = names_of(Inputs)


def _forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, n, plan, launch = x.leaves.hidden, len(x.ids), x.plan(), kernels(x.backend)
    rows = HeadRows.of(hidden, x.leaves.states, x.ids, x.transform, x.mask, gather=plan.compact)
    # float16 gradients of logits are those for weights of at most 1; the sums of their products are float32.
    half, weights, largest = hidden.dtype == torch.float16, x.weights, hidden.new_ones((), dtype=torch.float32)
    if half and weights is not None and n:
        largest = torch.where(x.mask, weights, 0).abs().amax().float()
        largest = torch.where((largest > 0) & (largest < torch.inf), largest, 1)
        weights = weights / largest
    topk = TopkRows(x.rule, x.teacher_ids, x.teacher_logprobs, weights)
    if rows.index is not None:
        topk = topk.rows(rows.index)
    found = torch.empty(3, len(rows.ids), dtype=torch.float32, device=hidden.device)

    def epilogue(logits: LogitRows, chunk: slice, out: Tensor) -> Tensor:
        part = torch.empty(3, chunk.stop - chunk.start, dtype=torch.float32, device=hidden.device)
        active = launch.topk_epilogue(logits, topk.rows(chunk), part, out)
        found[:, chunk] = part
        return active

    results = head_gradients(launch, x.storage.head(x.leaves), rows, n, plan, Needs(*x.needs), epilogue)
    if half:
        results = tuple(None if g is None else g * largest for g in results)
    found = rows.spread(found, n)
    terms = found[0].double() if x.weights is None else found[0].double() * torch.where(x.mask, x.weights, 0)
    loss = (terms.sum() / x.denominator).float()
    d_hidden, d_weight, d_bias, d_states, d_low_weight = (hidden.new_empty(0) if g is None else g for g in results)
    return loss, found, d_hidden, d_weight, d_bias, d_states, d_low_weight


def _fake(x: Inputs) -> tuple[Tensor, ...]:
    hidden, f32 = x.leaves.hidden, torch.float32
    gradients = [
        hidden.new_empty(
            leaf.shape if needed and leaf is not None else (0,), dtype=x.plan().sum_dtype if name == "weight" else f32
        )
        for name, leaf, needed in zip(HeadInputs._fields, x.leaves, x.needs, strict=True)
    ]
    return hidden.new_empty((), dtype=f32), hidden.new_empty((3, *x.ids.shape), dtype=f32), *gradients


class LinearTopkKL(torch.autograd.Function):
    """Autograd function that computes the gradients in forward and scales them by the upstream gradient in backward."""

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> tuple[Tensor, Tensor]:
        """Return the loss and the numbers per token; save the gradients."""
        inputs = unflatten(Inputs, flat)
        loss, found, *gradients = _op(*flat)
        save_gradients(ctx, inputs.leaves, inputs.needs, inputs.backend, inputs.denominator, gradients, found)
        return loss, found

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # one gradient per output
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Return the saved gradients, scaled by the upstream gradient."""
        return scaled_gradients(ctx, grad_loss, "linear_topk_kl", NAMES, HeadInputs._fields, lambda x: x)


_op = define_record("linear_topk_kl", Inputs, _forward, _fake)
