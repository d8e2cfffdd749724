"""Argument records of the kernels, the same for every backend, and result records of the public functions.

Legend: N tokens, V vocabulary, B sequences, T positions.
"""

from collections import namedtuple
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._options import SCALARS, PPOArguments, Scalar


class Transform(NamedTuple):
    """The transform of raw logits `u`: `z = softcap * tanh(logit_scale * u / softcap) / temperature`."""

    temperatures: Tensor | None = None  # (N,), float32; None: `temperature` everywhere
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    @classmethod
    def of(
        cls, temperature: float | Tensor = 1.0, softcap: float | None = None, logit_scale: float = 1.0
    ) -> "Transform":
        """Return the transform for a public function's arguments; a temperature tensor can have any shape and dtype."""
        if isinstance(temperature, Tensor):
            return cls(temperature.detach().reshape(-1).float().contiguous(), 1.0, softcap, float(logit_scale))
        return cls(None, float(temperature), softcap, float(logit_scale))

    def capped(self, u: Tensor) -> Tensor:
        """Return `softcap * tanh(logit_scale * u / softcap)`, the logits before the division by the temperature."""
        if self.logit_scale != 1.0:
            u = u * self.logit_scale
        return u if self.softcap is None else self.softcap * torch.tanh(u / self.softcap)

    def rows(self, index: Tensor | slice) -> "Transform":
        """Return the transform of the rows that `index` selects."""
        return self if self.temperatures is None else self._replace(temperatures=self.temperatures[index])


@dataclass(frozen=True)
class LogitRows:
    """Rows of logits viewed as (N, V), with the token id of each row."""

    logits: Tensor  # (N, V) or (B, T, V); unit stride along V, any other strides
    ids: Tensor  # (N,), int64
    transform: Transform
    mask: Tensor | None = None  # (N,), bool
    part: bool = False  # the columns of one shard: an id outside of [0, V) is in a different shard, and not an error

    def layout(self) -> tuple[int, int, int, int, int]:
        """Return (N, V, row, inner, outer), where row r starts at element `r // inner * outer + r % inner * row`."""
        vocab = self.logits.shape[-1]
        n = self.logits.numel() // vocab
        inner, outer = (n, 0) if self.logits.dim() == 2 else (self.logits.shape[1], self.logits.stride(0))
        return n, vocab, self.logits.stride(-2), max(inner, 1), outer


@dataclass(frozen=True)
class RowStats:
    """Statistics of each row: log-prob, entropy, shift and 1 / sum, where `p_j = exp((w_j - shift) * factor) / sum`."""

    buffer: Tensor  # (4, N), float32

    @classmethod
    def empty(cls, n: int, device: torch.device) -> "RowStats":
        """Return uninitialised statistics of `n` rows."""
        return cls(torch.empty(4, n, dtype=torch.float32, device=device))

    @property
    def logprobs(self) -> Tensor:
        """Log-probability of each row's id, (N,)."""
        return self.buffer[0]

    @property
    def entropy(self) -> Tensor:
        """Entropy of each row's distribution, (N,)."""
        return self.buffer[1]


KERNEL_SCALARS = tuple(row for row in SCALARS if row.kernel)
NUMBERS = tuple(row.name for row in KERNEL_SCALARS if not row.choices)
CHOICES = tuple(row.name for row in KERNEL_SCALARS if row.choices)
_ROWS = {row.name: row for row in SCALARS}


KernelScalars = namedtuple("KernelScalars", [row.name for row in KERNEL_SCALARS])
"""One field per option that the kernels read: a number, or the index of a choice."""


def _code(row: Scalar, args: PPOArguments) -> float:
    """Return the value of an option as a number."""
    value = getattr(args, row.name)
    if row.choices:
        return row.choices.index(value)
    if value is not None:
        return float(value)
    if isinstance(row.off, str):
        return _code(_ROWS[row.off], args)
    if isinstance(row.off, dict):
        return row.off.get(str(args.objective), 0.0)
    assert row.off is not None, row.name
    return row.off


class PpoScalars(KernelScalars):
    """Scalars of the objective as the kernels receive them: a choice is its index, and None is replaced by a number."""

    __slots__ = ()

    @classmethod
    def of(cls, args: PPOArguments) -> "PpoScalars":
        """Return the scalars for the options of one call."""
        return cls(*(_code(row, args) for row in KERNEL_SCALARS))

    @classmethod
    def from_lists(cls, numbers: list[float], choices: list[int]) -> "PpoScalars":
        """Return the scalars from the results of `numbers` and `choices`, which is how a registered op receives them."""
        return cls(**dict(zip(NUMBERS, numbers, strict=True)), **dict(zip(CHOICES, choices, strict=True)))

    def numbers(self) -> list[float]:
        """Return the fields that are numbers, in the order of `NUMBERS`."""
        return [getattr(self, name) for name in NUMBERS]

    def choices(self) -> list[int]:
        """Return the indices of the choices, in the order of `CHOICES`."""
        return [getattr(self, name) for name in CHOICES]


@dataclass(frozen=True)
class PpoRows:
    """Per-token constants of the objective, each (N,) float32 and contiguous."""

    scalars: PpoScalars
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor | None
    ref_logprobs: Tensor | None
    row_weight: Tensor | None

    def tensors(self) -> dict[str, Tensor | None]:
        """Return every field except `scalars`, by name."""
        return {name: x for name, x in vars(self).items() if name != "scalars"}

    def rows(self, index: Tensor | slice) -> "PpoRows":
        """Return the constants of the rows that `index` selects."""

        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index].contiguous()

        given = self.old_logprobs[index].contiguous(), self.advantages[index].contiguous()
        return PpoRows(self.scalars, *given, take(self.weights), take(self.ref_logprobs), take(self.row_weight))


@dataclass(frozen=True)
class Sequences:
    """How N flat tokens are divided into sequences: at the offsets `cu_seqlens`, or into `count` rows of `length` tokens."""

    count: int
    length: int
    cu_seqlens: Tensor | None  # (B + 1,), int32

    @classmethod
    def of(cls, tokens: Tensor, cu_seqlens: Tensor | None) -> "Sequences":
        """Return the sequences of `tokens`, (B, T) or (N,); without `cu_seqlens`, (N,) is one sequence."""
        if cu_seqlens is not None:
            return cls(cu_seqlens.numel() - 1, 0, cu_seqlens.contiguous())
        if tokens.dim() == 2:
            return cls(tokens.shape[0], tokens.shape[1], None)
        return cls(1, tokens.numel(), None)

    def check(self, n: int) -> None:
        """Raise ValueError unless `cu_seqlens` covers the `n` tokens in order. This reads the tensor's values."""
        if self.cu_seqlens is None:
            return
        ends = self.cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != n or ends != sorted(ends):
            raise ValueError(f"cu_seqlens: got {ends}, expected non-decreasing offsets from 0 to N = {n}")

    def check_on_cpu(self, tokens: Tensor) -> None:
        """Call `check` if the tokens are on the CPU, where reading values does not wait for a device."""
        if tokens.device.type == "cpu":
            self.check(tokens.numel())

    def lengths(self, mask: Tensor) -> Tensor:
        """Return the number of True tokens of each sequence, shape (B,), int64."""
        if self.cu_seqlens is None:
            return mask.view(self.count, self.length).sum(1)
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        return before[self.cu_seqlens.long()].diff()

    def per_token(self, x: Tensor, n: int) -> Tensor:  # (B,) -> (N,)
        """Return the value of each token's sequence; `n` is the number of tokens."""
        if self.cu_seqlens is None:
            return x.repeat_interleave(self.length)
        # Without `output_size` the host would wait for the device to compute it.
        return x.repeat_interleave(self.cu_seqlens.diff(), output_size=n)


class Aggregation(NamedTuple):
    """The weights of the tokens under one mask: relative weights in (0, 1], and the denominator of the weighted sum."""

    row_weight: Tensor | None  # (N,), float32; None: all 1
    denominator: Tensor  # ()

    @classmethod
    def of(
        cls, kind: str, mask: Tensor, sequences: Sequences, tokens: Tensor, num_sequences: float | Tensor | None
    ) -> "Aggregation":
        """Return the weights of the aggregation `kind`; `tokens` is the denominator of a mean over tokens."""
        if kind == "token_sum":
            return cls(None, torch.ones((), device=mask.device))
        if kind == "token_mean":
            return cls(None, tokens)
        lengths = sequences.lengths(mask)
        denominator = count(lengths > 0, num_sequences)
        if kind == "seq_mean_token_sum":
            return cls(None, denominator)
        # Relative to the shortest sequence, so that small weights do not make half-precision gradients underflow.
        shortest = torch.where(lengths > 0, lengths, lengths.max()).min().clamp(min=1) if lengths.numel() else 1
        return cls(sequences.per_token((shortest / lengths.clamp(min=1)).float(), mask.numel()), denominator * shortest)


def count(mask: Tensor, given: float | Tensor | None) -> Tensor:
    """Return the denominator `given` by the caller, or the number of True entries, and 1 instead of 0.

    The loss of an empty batch is therefore 0.
    """
    if given is None:
        return mask.sum().float().clamp(min=1)
    if isinstance(given, Tensor):
        x = given.to(mask.device).float()
        return torch.where(x > 0, x, 1)
    # torch.full fills the value on the device, without a copy from the host.
    return torch.full((), given if given > 0 else 1, dtype=torch.float32, device=mask.device)


class Denominators(NamedTuple):
    """The denominators of the kernels' sums, each () float32."""

    policy: Tensor
    value: Tensor
    tokens: Tensor
    value_tokens: Tensor
    one: Tensor


SUMS = (
    *("policy", "ref_kl_term", "entropy_term", "value_term"),  # multiplied by the aggregation's weight
    *("entropy", "clipped", "dual_clipped", "approx_kl", "k3", "ratio", "ref_kl", "active", "num_tokens"),
    *("value_clipped", "num_value_tokens", "returns", "returns_sq", "residual", "residual_sq"),
    "ratio_max",  # a maximum
)
"""The sums that the kernels of `ppo_loss` return, in the order of PpoSum (csrc/args.h)."""
TERM_SUMS = ("cross_entropy_term", "kl_term", "num_cross_entropy_tokens", "num_kl_tokens")
"""The sums of the tokens with a term other than the objective, which follow `SUMS` if there are terms."""
NLL_SUMS = ("nll_term", "num_nll_tokens")
"""The sums of the tokens of positive examples, which follow the others if there is an `nll_mask`."""


class TokenLogprobs(NamedTuple):
    """Log-probability of each id, and the entropy of the distribution at its position (None unless requested)."""

    logprobs: Tensor  # (...), float32
    entropy: Tensor | None  # (...), float32


class SampledTokens(NamedTuple):
    """Sampled ids, their log-probs under the full tempered softmax, and their log-probs under the filtered distribution."""

    ids: Tensor  # (B,), int64
    logprobs: Tensor  # (B,), float32
    sampling_logprobs: Tensor  # (B,), float32


class Advantages(NamedTuple):
    """Advantage estimates and the value targets `advantages + values`; 0 where the mask is False."""

    advantages: Tensor  # (B, T) or (N,), float32
    returns: Tensor  # (B, T) or (N,), float32


class RolloutAdvantages(NamedTuple):
    """GAE of the KL-shaped rewards, together with these rewards and the per-token KL that they contain."""

    advantages: Tensor  # (B, T) or (N,), float32, whitened on request
    returns: Tensor  # (B, T) or (N,), float32, never whitened
    rewards: Tensor  # (B, T) or (N,), float32
    kl: Tensor  # (B, T) or (N,), float32


class PPOLoss(NamedTuple):
    """The loss to call `backward` on, and metrics as detached float32 scalars on its device (see `METRICS`)."""

    loss: Tensor  # ()
    metrics: dict[str, Tensor]


METRICS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "clipfrac",
    "dual_clipfrac",
    "approx_kl",
    "kl_k3",
    "ratio_mean",
    "value_clipfrac",
    "ref_kl",
    "active_fraction",
    "ratio_max",
    "num_tokens",
    "num_value_tokens",
    "returns_sum",
    "returns_sq_sum",
    "residual_sum",
    "residual_sq_sum",
)
"""Keys of `PPOLoss.metrics`. For micro-batches with the global denominators, sum every metric over the micro-batches, but
take the maximum of `ratio_max`. `explained_variance` reads the last five."""


TERM_METRICS = ("cross_entropy_loss", "kl_loss", "num_cross_entropy_tokens", "num_kl_tokens")
"""More keys of `PPOLoss.metrics` if `term` is given: parts of the loss, and the tokens that have them."""
NLL_METRICS = ("nll_loss", "num_nll_tokens")
"""More keys of `PPOLoss.metrics` if `nll_mask` is given: the loss without its coefficient, and its tokens."""


def explained_variance(metrics: dict[str, Tensor]) -> Tensor:
    """Return `1 - Var(returns - values) / Var(returns)` from (summed) metrics of `ppo_loss`; NaN for constant returns."""
    n = metrics["num_value_tokens"]

    def variance(kind: str) -> Tensor:
        return metrics[f"{kind}_sq_sum"] / n - (metrics[f"{kind}_sum"] / n) ** 2

    spread = variance("returns")
    return torch.where(spread > 0, 1 - variance("residual") / spread, torch.nan)


# ---- flattened records, the arguments of torch.library ----

Record = TypeVar("Record")  # a NamedTuple of an op's arguments


def flatten(record: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the fields of a NamedTuple in order, with nested NamedTuples replaced by their fields."""
    flat: list[Any] = []
    for value in record:
        flat.extend(flatten(value) if isinstance(value, tuple) and hasattr(value, "_fields") else (value,))
    return tuple(flat)


def unflatten(record: type[Record], flat: Iterable[Any]) -> Record:
    """Return a `record` from its flattened fields, the inverse of `flatten`."""
    return _take(record, iter(flat))


def _take(record: type, values: Iterator[Any]) -> Any:
    annotations = record.__annotations__.values()
    return record(*[_take(a, values) if _is_record(a) else next(values) for a in annotations])


def _is_record(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple)


def flat_fields(record: type) -> list[tuple[str, Any]]:
    """Return names and annotations of the flattened fields of a NamedTuple."""
    fields: list[tuple[str, Any]] = []
    for name, annotation in record.__annotations__.items():
        fields += flat_fields(annotation) if _is_record(annotation) else [(name, annotation)]
    return fields


def names_of(record: type) -> tuple[str, ...]:
    """Return the names of the flattened fields of a NamedTuple."""
    return tuple(name for name, _ in flat_fields(record))


def tensors_apart(flat: Iterable[Any]) -> tuple[list[Tensor], list[Any]]:
    """Return the tensors, and all values with None instead of tensors; autograd stores tensors separately."""
    flat = tuple(flat)
    return [x for x in flat if isinstance(x, Tensor)], [None if isinstance(x, Tensor) else (x,) for x in flat]


def tensors_back(tensors: Iterable[Tensor], rest: list[Any]) -> tuple[Any, ...]:
    """Return the flat values again, the inverse of `tensors_apart`."""
    following = iter(tensors)
    return tuple(next(following) if x is None else x[0] for x in rest)
