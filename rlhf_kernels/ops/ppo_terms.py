"""Between the sums that the kernels return and the loss: aggregation weights, denominators, metrics."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..backend import Kernels
from ..launch_args import PpoRows, PpoScalars, Sequences
from ..types import METRICS, PPOLoss
from .ppo_arguments import PPOArguments

# Where each metric lies among the kernels' sums (csrc/args.h, PpoSum), and what it is divided by.
_POLICY, _VALUE, _TOKENS, _VALUE_TOKENS, _ONE = range(5)
_SOURCES = {
    "policy_loss": (0, _POLICY),
    "value_loss": (3, _VALUE),
    "entropy": (4, _TOKENS),
    "clipfrac": (5, _TOKENS),
    "dual_clipfrac": (6, _TOKENS),
    "approx_kl": (7, _TOKENS),
    "kl_k3": (8, _TOKENS),
    "ratio_mean": (9, _TOKENS),
    "ref_kl": (10, _TOKENS),
    "active_fraction": (11, _TOKENS),
    "num_tokens": (12, _ONE),
    "value_clipfrac": (13, _VALUE_TOKENS),
    "num_value_tokens": (14, _ONE),
    "returns_sum": (15, _ONE),
    "returns_sq_sum": (16, _ONE),
    "residual_sum": (17, _ONE),
    "residual_sq_sum": (18, _ONE),
    "ratio_max": (19, _ONE),
}


@dataclass(frozen=True)
class Aggregation:
    """What the aggregation makes of one mask: relative weights within (0, 1] and one denominator for their sum."""

    row_weight: Tensor | None  # (N,), float32; None: 1
    denominator: Tensor  # ()

    @classmethod
    def of(cls, kind: str, mask: Tensor, sequences: Sequences, tokens: Tensor, num_sequences) -> "Aggregation":
        """`tokens` is the denominator of a mean over tokens."""
        if kind == "token_sum":
            return cls(None, torch.ones((), device=mask.device))
        if kind == "token_mean":
            return cls(None, tokens)
        lengths = sequences.lengths(mask)
        denominator = count(lengths > 0, num_sequences)
        if kind == "seq_mean_token_sum":
            return cls(None, denominator)
        # Relative to the shortest sequence, so that half-precision gradients do not start out tiny.
        shortest = torch.where(lengths > 0, lengths, lengths.max()).min().clamp(min=1) if lengths.numel() else 1
        return cls(sequences.per_token((shortest / lengths.clamp(min=1)).float(), mask.numel()), denominator * shortest)


def count(mask: Tensor, given: float | Tensor | None) -> Tensor:
    """The caller's global denominator, or the True entries here; 1 instead of 0, so that an empty batch gives 0."""
    if given is None:
        return mask.sum().float().clamp(min=1)
    if isinstance(given, Tensor):
        x = given.to(mask.device).float()
        return torch.where(x > 0, x, 1)
    # Filled there: no copy from the host.
    return torch.full((), given if given > 0 else 1, dtype=torch.float32, device=mask.device)


@dataclass(frozen=True)
class ObjectiveTerms:
    """One call's options in the kernels' terms; every tensor flat, (N,)."""

    ppo: PpoRows
    mask: Tensor
    value_mask: Tensor
    value_row_weight: Tensor | None
    denominators: Tensor  # (5,): policy, value, num_tokens, num_value_tokens, 1
    sequences: Sequences
    sequence_level: bool
    vf_coef: float

    @classmethod
    def of(cls, args: PPOArguments, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> "ObjectiveTerms":
        sequences = Sequences.of(mask, args.cu_seqlens)
        value_mask = mask if args.value_mask is None else args.value_mask
        alike = value_mask is mask and args.num_value_tokens is args.num_tokens
        mask, value_mask = mask.reshape(-1).contiguous(), value_mask.reshape(-1).contiguous()
        tokens = value_tokens = count(mask, args.num_tokens)
        policy = value = Aggregation.of(args.aggregation, mask, sequences, tokens, args.num_sequences)
        if not alike:
            value_tokens = count(value_mask, args.num_value_tokens)
            value = Aggregation.of(args.aggregation, value_mask, sequences, value_tokens, args.num_sequences)
        one = torch.ones((), device=mask.device)
        constants = (old_logprobs, advantages, args.weights, args.ref_logprobs)
        return cls(
            PpoRows(scalars_of(args), *map(flat, constants), policy.row_weight),
            mask,
            value_mask,
            # Dynamo takes no tensor twice.
            None if value.row_weight is None else value.row_weight.view(-1),
            torch.stack([policy.denominator, value.denominator, tokens, value_tokens, one]),
            sequences,
            args.ratio_level == "sequence",
            args.vf_coef,
        )

    def pack(self) -> tuple:
        """Arguments of a registered op, whose schema knows tensors, numbers and strings."""
        p = self.ppo
        tensors = (p.old_logprobs, p.advantages, p.weights, p.ref_logprobs, p.row_weight)
        numbers = [float(getattr(p.scalars, name)) for name in _NUMBERS]
        kinds = f"{p.scalars.objective},{p.scalars.kl_estimator},{'sequence' if self.sequence_level else 'token'}"
        masks = (self.mask, self.value_mask, self.value_row_weight, self.denominators, self.sequences.cu_seqlens)
        return *tensors, *masks, [*numbers, float(self.vf_coef)], kinds, self.sequences.count, self.sequences.length

    @classmethod
    def unpack(cls, *packed) -> "ObjectiveTerms":
        *tensors, mask, value_mask, value_row_weight, denominators, cu_seqlens, numbers, kinds, n, length = packed
        objective, kl_estimator, level = kinds.split(",")
        scalars = PpoScalars(objective, kl_estimator, **dict(zip(_NUMBERS, numbers, strict=False)))
        ppo, sequences = PpoRows(scalars, *tensors), Sequences(n, length, cu_seqlens)
        return cls(ppo, mask, value_mask, value_row_weight, denominators, sequences, level == "sequence", numbers[-1])

    def sums(self, kernels: Kernels, logprobs, entropy, values, old_values, returns) -> tuple[Tensor, Tensor, Tensor]:
        """Slopes of the log-probs and the values, times their denominators, and the kernels' sums."""
        masks = (self.value_mask, self.value_row_weight)
        inputs = (logprobs, entropy, values, old_values, returns)
        return kernels.ppo_loss(self.ppo, self.sequences, self.sequence_level, self.mask, *inputs, *masks)

    def loss(self, sums: Tensor, *, valued: bool) -> Tensor:
        """The scalar loss from the kernels' sums; `valued` whether there are values. On a GPU each operation is a launch."""
        s, d = self.ppo.scalars, self.denominators
        policy = sums[0]
        if s.kl_coef:
            policy = policy + s.kl_coef * sums[1]
        if s.entropy_coef:
            policy = policy - s.entropy_coef * sums[2]
        policy = policy / d[_POLICY]
        return (policy + self.vf_coef * sums[3] / d[_VALUE] if valued else policy).float()

    def metrics(self, sums: Tensor) -> Tensor:
        """(len(METRICS),) float32, in the order of METRICS."""
        source, divisor = _metric_places(sums.device)
        return (sums[source] / self.denominators[divisor]).float()

    def entropy_slope(self) -> Tensor | None:
        """d loss / d entropy of each token, times the policy's denominator; None: 0."""
        coefficient = self.ppo.scalars.entropy_coef
        if not coefficient:
            return None
        weight = self.mask.float() if self.ppo.row_weight is None else self.ppo.row_weight * self.mask
        return -coefficient * weight


_NUMBERS = (
    "cliprange",
    "cliprange_high",
    "dual_clip",
    "log_ratio_clamp",
    "old_kl_coef",
    "kl_coef",
    "entropy_coef",
    "cliprange_value",
)


@cache
def _metric_places(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each metric: its place among the sums, and that of what divides it. Made once: a copy to a device waits for it."""
    source, divisor = zip(*(_SOURCES[name] for name in METRICS), strict=True)
    return torch.tensor(source, device=device), torch.tensor(divisor, device=device)


def flat(x: Tensor | None) -> Tensor | None:
    """A constant of the objective as the kernels read it: detached, (N,), float32, contiguous."""
    return None if x is None else x.detach().reshape(-1).float().contiguous()


def scalars_of(args: PPOArguments) -> PpoScalars:
    return PpoScalars(
        objective=args.objective,
        kl_estimator=args.kl_estimator,
        cliprange=args.cliprange,
        cliprange_high=args.cliprange if args.cliprange_high is None else args.cliprange_high,
        dual_clip=math.inf if args.dual_clip is None else args.dual_clip,
        log_ratio_clamp=math.inf if args.log_ratio_clamp is None else args.log_ratio_clamp,
        old_kl_coef=args.old_kl_coef,
        kl_coef=args.kl_coef,
        entropy_coef=args.entropy_coef,
        cliprange_value=math.inf if args.cliprange_value is None else args.cliprange_value,
    )


def as_loss(loss: Tensor, metrics: Tensor) -> PPOLoss:
    """What the caller gets: the metrics by name, detached."""
    return PPOLoss(loss, dict(zip(METRICS, metrics.detach().unbind(), strict=True)))
