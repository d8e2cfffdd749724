"""The parts of the PPO objective outside the kernels: checks of options, aggregation weights, denominators, loss, metrics.

Legend: B sequences, T positions, N tokens.
"""

from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._options import (
    DENOMINATORS,
    OF_SEQUENCES,
    OPTIONS,
    TOKEN_TENSORS,
    PPOArguments,
    PPOOptions,
    Term,
)
from ..backend import Kernels
from ..launch_args import (
    SUMS,
    Aggregation,
    Denominators,
    PPOLoss,
    PpoRows,
    PpoScalars,
    Sequences,
    count,
)
from . import checks, custom_objective, row_terms
from .row_terms import OtherLosses
from .scalars import scalars_of


def parse(caller: str, options: PPOOptions) -> PPOArguments:
    """Return the options of a call; raise TypeError for an unknown option, with the nearest known name."""
    for name in options:
        if name not in OPTIONS:
            near = get_close_matches(name, OPTIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(OPTIONS)}"
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}{hint}")
    return PPOArguments(**options)


def sequence_level(args: PPOArguments) -> bool:
    """Return whether the ratio is one number per sequence."""
    return args.ratio_level == "sequence" or args.objective in OF_SEQUENCES


def as_options(args: PPOArguments, mask: Tensor) -> dict[str, Any]:
    """Return all options by name, as keyword arguments of the reference."""
    options = {name: getattr(args, name) for name in OPTIONS}
    if callable(args.objective):
        options["objective"] = custom_objective.checked(args.objective, mask.reshape(-1))
    return options


def check(
    args: PPOArguments,
    rows: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    name: str,
    value_head: bool = False,
    computes_entropy: bool = False,
) -> None:
    """Check all arguments against `rows`, a tensor with one entry per token that is the argument `name` of the op.

    `value_head` and `computes_entropy` state whether the op computes the values and the entropy itself.
    """
    needs_sequences = sequence_level(args) or args.aggregation.startswith("seq")
    checks.sequences(rows, args.cu_seqlens, name=name, needed=needs_sequences)
    like: checks.Like = {"like": rows, "expected": rows.shape, "what": f"the token shape of {name}"}
    checks.tensor("old_logprobs", old_logprobs, **like)
    checks.tensor("advantages", advantages, **like)
    checks.mask("mask", mask, **like)
    for tensor in TOKEN_TENSORS:
        if getattr(args, tensor) is not None:
            checks.tensor(tensor, getattr(args, tensor), **like)
    for tensor in ("value_mask", "nll_mask"):
        if getattr(args, tensor) is not None:
            checks.mask(tensor, getattr(args, tensor), **like)
    if args.objective_inputs is not None:
        custom_objective.check_inputs(args.objective_inputs, like)
    if args.term is not None:
        row_terms.check(args.term, args, mask, like)
    for denominator in DENOMINATORS:
        if getattr(args, denominator) is not None:
            checks.denominator(denominator, getattr(args, denominator))
    scalars_of(args)
    _check_combinations(args, computes_entropy)
    _check_values(args, value_head)


def _check_combinations(args: PPOArguments, computes_entropy: bool) -> None:
    if args.objective_inputs is not None and not callable(args.objective):
        raise ValueError(
            f"objective_inputs is set, but objective={args.objective!r} reads none; pass a function as objective"
        )
    row_terms.check_settings(args)
    if args.kl_coef and args.ref_logprobs is None:
        raise ValueError(
            f"ref_logprobs is not set, but kl_coef={args.kl_coef} needs it; pass the reference model's log-probs"
        )
    if args.entropy_coef and args.entropy is None and not computes_entropy:
        raise ValueError(
            f"entropy is not set, but entropy_coef={args.entropy_coef} needs it; pass the entropy of each token"
        )
    if computes_entropy and args.entropy is not None:
        raise ValueError("entropy: got a tensor, expected None: this op computes the entropy; leave the argument out")


def _check_values(args: PPOArguments, value_head: bool) -> None:
    if value_head and args.values is not None:
        raise ValueError("pass values or value_weight, not both")
    predicted = value_head or args.values is not None
    if predicted and args.returns is None:
        raise ValueError("returns is not set, but the value loss needs it; pass the value targets")
    for name in ("returns", "old_values", "value_mask", "num_value_tokens"):
        if getattr(args, name) is not None and not predicted:
            raise ValueError(f"{name} is set but there are no value predictions; pass values, or leave {name} out")


_SOURCES = {
    "policy_loss": ("policy", "policy"),
    "value_loss": ("value_term", "value"),
    "entropy": ("entropy", "tokens"),
    "clipfrac": ("clipped", "tokens"),
    "dual_clipfrac": ("dual_clipped", "tokens"),
    "approx_kl": ("approx_kl", "tokens"),
    "kl_k3": ("k3", "tokens"),
    "ratio_mean": ("ratio", "tokens"),
    "ref_kl": ("ref_kl", "tokens"),
    "active_fraction": ("active", "tokens"),
    "num_tokens": ("num_tokens", "one"),
    "value_clipfrac": ("value_clipped", "value_tokens"),
    "num_value_tokens": ("num_value_tokens", "one"),
    "returns_sum": ("returns", "one"),
    "returns_sq_sum": ("returns_sq", "one"),
    "residual_sum": ("residual", "one"),
    "residual_sq_sum": ("residual_sq", "one"),
    "ratio_max": ("ratio_max", "one"),
    "cross_entropy_loss": ("cross_entropy_term", "policy"),
    "kl_loss": ("kl_term", "policy"),
    "num_cross_entropy_tokens": ("num_cross_entropy_tokens", "one"),
    "num_kl_tokens": ("num_kl_tokens", "one"),
    "nll_loss": ("nll_term", "policy"),
    "num_nll_tokens": ("num_nll_tokens", "one"),
}
"""Metric -> its sum among `SUMS` and those of `OtherLosses`, and its denominator among the fields of `Denominators`."""
_PLACE = {name: i for i, name in enumerate(SUMS)}


class ObjectiveTerms(NamedTuple):
    """The options of one call as arguments of a registered op: flat tensors (N,), numbers, and choices as their index."""

    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor | None
    ref_logprobs: Tensor | None
    row_weight: Tensor | None
    mask: Tensor  # the tokens of the objective
    all_tokens: Tensor | None  # (N,), bool: the tokens of all losses but the values'; None: `mask`
    others: OtherLosses
    value_mask: Tensor
    value_row_weight: Tensor | None
    stacked_denominators: Tensor  # (5,), the fields of Denominators
    cu_seqlens: Tensor | None  # (B + 1,)
    num_sequences: int
    length: int
    sequence_level: bool
    vf_coef: float
    numbers: list[float]  # see PpoScalars
    choices: list[int]
    custom_sum: Tensor | None  # (), float64: the sum of the policy term if the objective is a function
    custom_slope: Tensor | None  # (N,): its derivatives

    @classmethod
    def of(
        cls,
        args: PPOArguments,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        logprobs: Tensor | None = None,  # needed if the objective is a function
    ) -> "ObjectiveTerms":
        """Return the terms of a call from its checked arguments."""
        sequences = Sequences.of(mask, args.cu_seqlens)
        all_tokens, given = None, mask.reshape(-1)
        if args.term is not None or args.nll_mask is not None:
            all_tokens = row_terms.tokens_of(args.nll_mask, mask).reshape(-1).contiguous()
        if args.term is not None:
            mask = mask & (args.term == Term.RL.value)  # a compiler finds no tensor equal to an enum
        value_mask = mask if args.value_mask is None else args.value_mask
        alike = value_mask is mask and args.num_value_tokens is args.num_tokens
        mask, value_mask = mask.reshape(-1).contiguous(), value_mask.reshape(-1).contiguous()
        tokens = value_tokens = count(mask, args.num_tokens)
        policy = value = Aggregation.of(args.aggregation, mask, sequences, tokens, args.num_sequences)
        if not alike:
            value_tokens = count(value_mask, args.num_value_tokens)
            value = Aggregation.of(args.aggregation, value_mask, sequences, value_tokens, args.num_sequences)
        one = torch.ones((), device=mask.device)
        others, custom_sum, custom_slope = OtherLosses(), None, None
        if all_tokens is not None or args.term_weights is not None:
            policy, others = row_terms.RowTerms.of(args, given, mask, sequences, policy)
        if callable(args.objective):
            constants = logprobs, old_logprobs, advantages, mask, policy.row_weight
            custom_sum, custom_slope = custom_objective.weighted(args, *constants)
            args = replace(args, objective="policy_gradient", weights=None)
            advantages = torch.zeros_like(advantages)  # the kernels compute the other terms
        scalars = PpoScalars.of(args)
        return cls(
            old_logprobs=checks.flat(old_logprobs),
            advantages=checks.flat(advantages),
            weights=checks.flat(args.weights),
            ref_logprobs=checks.flat(args.ref_logprobs),
            row_weight=policy.row_weight,
            mask=mask,
            all_tokens=all_tokens,
            others=others,
            value_mask=value_mask,
            # A view, because Dynamo does not accept the same tensor as two arguments.
            value_row_weight=None if value.row_weight is None else value.row_weight.view(-1),
            stacked_denominators=torch.stack(
                Denominators(policy.denominator, value.denominator, tokens, value_tokens, one)
            ),
            cu_seqlens=sequences.cu_seqlens,
            num_sequences=sequences.count,
            length=sequences.length,
            sequence_level=sequence_level(args),
            vf_coef=float(args.vf_coef),
            numbers=scalars.numbers(),
            choices=scalars.choices(),
            custom_sum=custom_sum,
            custom_slope=custom_slope,
        )

    @property
    def scalars(self) -> PpoScalars:
        """The scalars of the objective."""
        return PpoScalars.from_lists(self.numbers, self.choices)

    @property
    def ppo(self) -> PpoRows:
        """The constants of each token, as the kernels expect them."""
        constants = (self.old_logprobs, self.advantages, self.weights, self.ref_logprobs, self.row_weight)
        return PpoRows(self.scalars, *constants)

    @property
    def num_metrics(self) -> int:
        """The number of metrics."""
        return len(self.others.metrics)

    @property
    def tokens(self) -> Tensor:
        """The mask of the tokens whose log-probs are read, (N,)."""
        return self.mask if self.all_tokens is None else self.all_tokens

    @property
    def sequences(self) -> Sequences:
        """The bounds of the sequences."""
        return Sequences(self.num_sequences, self.length, self.cu_seqlens)

    @property
    def denominators(self) -> Denominators:
        """The denominators by name."""
        return Denominators(*self.stacked_denominators)

    def sums(
        self,
        kernels: Kernels,
        logprobs: Tensor,
        entropy: Tensor | None,
        values: Tensor | None,
        old_values: Tensor | None,
        returns: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return d loss / d log-prob and d value loss / d value, times their denominators, and the kernels' sums."""
        slope, value_slope, sums = kernels.ppo_loss(
            ppo=self.ppo,
            sequences=self.sequences,
            sequence_level=self.sequence_level,
            mask=self.mask,
            logprobs=logprobs,
            entropy=entropy,
            values=values,
            old_values=old_values,
            returns=returns,
            value_mask=self.value_mask,
            value_row_weight=self.value_row_weight,
        )
        if self.custom_slope is not None and self.custom_sum is not None:
            slope = slope + self.custom_slope
            h = self.entropy_slope() if entropy is not None else None
            sums[_PLACE["policy"]] = self.custom_sum
            sums[_PLACE["active"]] = (slope != 0 if h is None else (slope != 0) | (h != 0)).sum()
        if self.others.present:
            own = logprobs, self.ref_logprobs, self.scalars.kl_estimator
            slope, sums = self.others.add(kernels, slope, sums, *own)
        return slope, value_slope, sums

    def loss(self, sums: Tensor, *, valued: bool) -> Tensor:
        """Return the scalar loss from the kernels' sums; `valued` states whether there are value predictions.

        Terms with a coefficient of 0 are skipped, because each operation is a kernel launch on a GPU.
        """
        s, d = self.scalars, self.denominators
        policy = sums[_PLACE["policy"]]
        if s.kl_coef:
            policy = policy + s.kl_coef * sums[_PLACE["ref_kl_term"]]
        if s.entropy_coef:
            policy = policy - s.entropy_coef * sums[_PLACE["entropy_term"]]
        for i, name in enumerate(self.others.sums, len(SUMS)):
            coefficient = {"cross_entropy_term": 1.0, "kl_term": 1.0, "nll_term": self.others.nll_coef}.get(name, 0.0)
            policy = policy + coefficient * sums[i] if coefficient else policy
        policy = policy / d.policy
        return (policy + self.vf_coef * sums[_PLACE["value_term"]] / d.value if valued else policy).float()

    def metrics(self, sums: Tensor) -> Tensor:
        """Return the metrics from the sums, (num_metrics,) float32, in the order of `others.metrics`."""
        source, divisor = metric_places(sums.device, self.others.metrics, SUMS + self.others.sums)
        return (sums[source] / self.stacked_denominators[divisor]).float()

    def entropy_slope(self) -> Tensor | None:
        """Return d loss / d entropy of each token, times the policy's denominator; None if it is 0."""
        coefficient = self.scalars.entropy_coef
        if not coefficient:
            return None
        weight = self.mask.float() if self.row_weight is None else self.row_weight * self.mask
        return -coefficient * weight


@cache
def metric_places(device: torch.device, metrics: tuple[str, ...], sums: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return the index of the sum, and of the denominator, of each metric.

    Cached, because a copy to the device synchronizes with it.
    """
    source, divisor = zip(*(_SOURCES[name] for name in metrics), strict=True)
    places = [sums.index(name) for name in source], [Denominators._fields.index(name) for name in divisor]
    return torch.tensor(places[0], device=device), torch.tensor(places[1], device=device)


def as_loss(loss: Tensor, metrics: Tensor, terms: ObjectiveTerms) -> PPOLoss:
    """Return the result of the public functions: the loss, and the metrics by name and detached."""
    return PPOLoss(loss, dict(zip(terms.others.metrics, metrics.detach().unbind(), strict=True)))
