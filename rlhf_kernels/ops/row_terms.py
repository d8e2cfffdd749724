"""Tokens whose loss is a cross-entropy or a KL instead of the objective (`term`), and weights of whole tokens.

The kernels compute the objective of the tokens with `Term.RL`. The other tokens are added here, because a token's gradient
is one coefficient of its row for any term.

Legend: N tokens, B sequences.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .._options import PPOArguments, Term
from ..backend import Kernels
from ..launch_args import Aggregation, Sequences, count
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


class RowTerms(NamedTuple):
    """The policy's aggregation with `term_weights`, and the tokens of the other terms."""

    policy: Aggregation
    weights: Tensor | None  # (2, N), float32: of each token's cross-entropy and KL, or 0
    counts: Tensor | None  # (2,), float64: tokens with a cross-entropy, and with a KL

    @classmethod
    def of(
        cls, args: PPOArguments, mask: Tensor, policy_mask: Tensor, sequences: Sequences, policy: Aggregation
    ) -> "RowTerms":
        """Return the terms of a call; `mask` (N,) has the tokens of all terms, `policy_mask` those of `policy`."""
        given = checks.flat(args.term_weights)

        def weighted(x: Tensor, on: Tensor) -> Tensor:
            return torch.where(on, x if given is None else x * given, 0)

        one = torch.ones((), device=mask.device)
        of_policy = weighted(one if policy.row_weight is None else policy.row_weight, policy_mask)
        weights = counts = None
        if args.term is not None:
            term, found = args.term.reshape(-1), cast(list[Tensor], [])  # a compiler does not know `list[Tensor]()`
            masks = [mask & (term == Term.CROSS_ENTROPY.value), mask & (term == Term.KL.value)]
            for on, total in zip(masks, (args.num_cross_entropy_tokens, args.num_kl_tokens), strict=True):
                own = Aggregation.of(args.aggregation, on, sequences, count(on, total), args.num_sequences)
                factor = policy.denominator / own.denominator  # the sum of all terms is divided by the policy's
                found.append(weighted((one if own.row_weight is None else own.row_weight) * factor, on))
            known = policy_mask | masks[0] | (masks[1] if args.ref_logprobs is not None else False)
            found[0] = torch.where(mask & ~known, torch.nan, found[0])
            weights, counts = torch.stack(found), torch.stack(masks).sum(1).double()
        # Relative to the largest, so that small weights do not make half-precision gradients underflow.
        largest = one
        if mask.numel():
            largest = (
                of_policy.abs().amax() if weights is None else torch.maximum(of_policy, weights.abs().amax(0)).amax()
            )
            largest = torch.where(largest > 0, largest, 1)
        policy = Aggregation(of_policy / largest, policy.denominator / largest)
        return cls(policy, None if weights is None else weights / largest, counts)


def slope_and_sums(
    kernels: Kernels, weights: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, estimator: int
) -> tuple[Tensor, Tensor]:
    """Return d loss / d log-prob of the other terms, (N,), and their sums, (2,) float64, for the weights of `RowTerms`."""
    cross_entropy, kl = weights
    slope, of_kl = -cross_entropy, kl
    if ref_logprobs is not None:
        pair = logprobs, ref_logprobs
        slope = slope + torch.where(kl != 0, kernels.kl_penalty_backward(kl.contiguous(), *pair, estimator), 0)
        of_kl = kernels.kl_penalty(*pair, estimator)
    values = torch.stack((-logprobs, of_kl)).double()
    return slope, torch.where(weights != 0, weights * values, 0).sum(1)
