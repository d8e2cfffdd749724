"""Losses of tokens other than the objective, and weights of whole tokens.

They are a cross-entropy or a KL instead of the objective (`term`), and minus the log-prob of positive examples (`nll_mask`),
whose tokens can have the objective too. The kernels compute the objective of the tokens with `Term.RL`. The other losses are
added here, because a token's gradient is one coefficient of its row for any loss.

Legend: N tokens, B sequences.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .._options import PPOArguments, Term
from ..backend import Kernels
from ..launch_args import METRICS, NLL_METRICS, NLL_SUMS, TERM_METRICS, TERM_SUMS, Aggregation, Sequences, count
from . import checks


def check(term: Tensor, args: PPOArguments, mask: Tensor, like: checks.Like) -> None:
    """Check the codes. On a GPU the host would wait for them, and an invalid one gives NaN instead."""
    checks.integers("term", term, **like)
    if not (checks.values_visible(term) and checks.values_visible(mask)):
        return
    codes = ", ".join(f"{code.value} = {code.name}" for code in Term)
    outside = term[mask & ((term < 0) | (term >= len(Term)))]
    if outside.numel():
        raise ValueError(f"term: got {outside[0].item()} for a token, expected {codes}")
    if args.ref_logprobs is None and bool((mask & (term == Term.KL)).any()):
        raise ValueError(
            "ref_logprobs is not set, but tokens with Term.KL need it; pass the reference model's log-probs"
        )


def check_settings(args: PPOArguments) -> None:
    """Raise ValueError for an option of these losses without the tensor that selects their tokens."""
    for name in ("num_cross_entropy_tokens", "num_kl_tokens"):
        if args.term is None and getattr(args, name) is not None:
            raise ValueError(f"{name} is set, but term is not; pass the term of each token, or leave {name} out")
    if args.nll_mask is None:
        if args.nll_coef:
            raise ValueError(
                f"nll_mask is not set, but nll_coef={args.nll_coef} needs it; pass the tokens of the positive examples"
            )
        if args.num_nll_tokens is not None:
            raise ValueError(
                "num_nll_tokens is set, but nll_mask is not; pass the tokens of the positive examples, or leave it out"
            )


def tokens_of(nll_mask: Tensor | None, mask: Tensor) -> Tensor:
    """Return the tokens whose log-prob the loss reads, those of `mask` and `nll_mask`; a wrong `mask` is refused later."""
    if nll_mask is None or not (isinstance(mask, Tensor) and mask.dtype is torch.bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        return mask
    checks.mask("nll_mask", nll_mask, like=mask, expected=mask.shape, what="the shape of mask")
    return mask | nll_mask


class OtherLosses(NamedTuple):
    """The weights of the losses other than the objective, as arguments of a registered op."""

    term_weight: Tensor | None = None  # (2, N), float32: of each token's cross-entropy and KL, or 0
    term_counts: Tensor | None = None  # (2,), float64: tokens with a cross-entropy, and with a KL
    nll_weight: Tensor | None = None  # (N,), float32: of the positive examples, without the coefficient
    nll_count: Tensor | None = None  # (1,), float64
    nll_coef: float = 0.0

    @property
    def present(self) -> bool:
        """Whether there are such losses."""
        return self.term_weight is not None or self.nll_weight is not None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics of a call."""
        more = () if self.term_weight is None else TERM_METRICS
        return METRICS + more + (() if self.nll_weight is None else NLL_METRICS)

    @property
    def sums(self) -> tuple[str, ...]:
        """The names of the sums that `add` appends."""
        return (() if self.term_weight is None else TERM_SUMS) + (() if self.nll_weight is None else NLL_SUMS)

    def rows(self, index: Tensor | slice) -> "OtherLosses":
        """Return the losses of the rows that `index` selects."""
        weights, nll = (None if x is None else x[..., index].contiguous() for x in (self.term_weight, self.nll_weight))
        return self._replace(term_weight=weights, nll_weight=nll)

    def add(
        self,
        kernels: Kernels,
        slope: Tensor,
        sums: Tensor,
        logprobs: Tensor,
        ref_logprobs: Tensor | None,
        estimator: int,
    ) -> tuple[Tensor, Tensor]:
        """Return d loss / d log-prob with that of these losses, (N,), and the sums with theirs, float64."""
        if self.term_weight is not None and self.term_counts is not None:
            more, found = _terms(kernels, self.term_weight, logprobs, ref_logprobs, estimator)
            slope, sums = slope + more, torch.cat((sums, found, self.term_counts))
        if self.nll_weight is not None and self.nll_count is not None:
            found = torch.where(self.nll_weight != 0, -self.nll_weight * logprobs.double(), 0).sum()
            slope, sums = slope - self.nll_coef * self.nll_weight, torch.cat((sums, found.view(1), self.nll_count))
        return slope, sums


def _terms(
    kernels: Kernels, weights: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, estimator: int
) -> tuple[Tensor, Tensor]:
    """Return d loss / d log-prob of the tokens with a `term`, (N,), and their sums, (2,) float64."""
    cross_entropy, kl = weights
    slope, of_kl = -cross_entropy, kl
    if ref_logprobs is not None:
        pair = logprobs, ref_logprobs
        slope = slope + torch.where(kl != 0, kernels.kl_penalty_backward(kl.contiguous(), *pair, estimator), 0)
        of_kl = kernels.kl_penalty(*pair, estimator)
    values = torch.stack((-logprobs, of_kl)).double()
    return slope, torch.where(weights != 0, weights * values, 0).sum(1)


class RowTerms(NamedTuple):
    """The policy's aggregation with `term_weights`, and the other losses."""

    policy: Aggregation
    others: OtherLosses

    @classmethod
    def of(
        cls, args: PPOArguments, mask: Tensor, policy_mask: Tensor, sequences: Sequences, policy: Aggregation
    ) -> "RowTerms":
        """Return the terms of a call; `mask` (N,) has the tokens of all terms, `policy_mask` those of `policy`."""
        given = checks.flat(args.term_weights)

        def weighted(x: Tensor, on: Tensor) -> Tensor:
            return torch.where(on, x if given is None else x * given, 0)

        def own(on: Tensor, total: float | Tensor | None) -> Tensor:
            found = Aggregation.of(args.aggregation, on, sequences, count(on, total), args.num_sequences)
            factor = policy.denominator / found.denominator  # the sum of all losses is divided by the policy's
            return weighted((one if found.row_weight is None else found.row_weight) * factor, on)

        one = torch.ones((), device=mask.device)
        of_policy = weighted(one if policy.row_weight is None else policy.row_weight, policy_mask)
        weights = counts = nll = nll_count = None
        if args.term is not None:
            term, found = args.term.reshape(-1), cast(list[Tensor], [])  # a compiler does not know `list[Tensor]()`
            masks = [mask & (term == Term.CROSS_ENTROPY.value), mask & (term == Term.KL.value)]
            for on, total in zip(masks, (args.num_cross_entropy_tokens, args.num_kl_tokens), strict=True):
                found.append(own(on, total))
            known = policy_mask | masks[0] | (masks[1] if args.ref_logprobs is not None else False)
            found[0] = torch.where(mask & ~known, torch.nan, found[0])
            weights, counts = torch.stack(found), torch.stack(masks).sum(1).double()
        if args.nll_mask is not None:
            positive = args.nll_mask.reshape(-1)
            nll, nll_count = own(positive, args.num_nll_tokens), positive.sum().double().view(1)
        # Relative to the largest, so that small weights do not make half-precision gradients underflow.
        largest = one
        if mask.numel():
            largest = of_policy.abs().amax()
            if weights is not None:
                largest = torch.maximum(largest, weights.abs().amax())
            if nll is not None:
                largest = torch.maximum(largest, args.nll_coef * nll.abs().amax())
            largest = torch.where(largest > 0, largest, 1)
        weights, nll = (None if x is None else x / largest for x in (weights, nll))
        policy = Aggregation(of_policy / largest, policy.denominator / largest)
        return cls(policy, OtherLosses(weights, counts, nll, nll_count, float(args.nll_coef)))
