"""Records of the ops that weight, select and distil tokens: arguments and launchers of the kernels, results of the functions.

Legend: N tokens, B sequences, T positions, V vocabulary, K tokens that a teacher lists.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from .launch_args import LogitRows, Sequences

# ---- importance weights and masks ----

IMPORTANCE_LEVELS = ("token", "sequence", "geometric")
IMPORTANCE_ACTIONS = ("truncate", "mask", "clip")
IMPORTANCE_STATISTICS = ("ratio", "k1", "k2", "k3")
"""The choices of `importance_weights`; the kernels receive the index (csrc/math/importance.h)."""
LOG_RATIO_BOUND = 20.0
"""Log-ratios of `importance_weights` are limited to ± this number before they are exponentiated."""

IMPORTANCE_METRICS = (
    "ess",
    "chi2",
    "mismatch_kl",
    "mismatch_k3",
    "mismatch_max",
    "rejected_share",
    "below_share",
    "above_share",
    "weight_mean",
    "weight_max",
    "num_tokens",
)
"""Keys of `ImportanceWeights.metrics`, in the order of `importance_metrics` in csrc/math/importance.h."""
ENTROPY_METRICS = ("entropy_threshold", "rejected_share", "num_tokens")
"""Keys of the metrics of `top_entropy_mask`, in the order of the kernels."""


class ImportanceWeights(NamedTuple):
    """Weight of each token, the tokens that remain, and metrics as float32 scalars (see `IMPORTANCE_METRICS`)."""

    weights: Tensor  # (B, T) or (N,), float32, 0 where the mask is False
    mask: Tensor  # (B, T) or (N,), bool
    metrics: dict[str, Tensor]


class TokenSelection(NamedTuple):
    """The tokens of a mask that remain, and metrics as float32 scalars."""

    mask: Tensor  # (B, T) or (N,), bool
    metrics: dict[str, Tensor]


# ---- distillation ----

DIRECTIONS = ("forward", "reverse", "jsd")
"""The choices of `linear_topk_kl`; the kernels receive the index (csrc/math/topk.h)."""
TAILS = ("drop", "lump")
TAIL_FLOOR = 1e-7
"""Smallest probability of the tokens that are not listed, where they count as one term."""


class TopkKL(NamedTuple):
    """The loss to call `backward` on, and per token, detached: the divergence and the mass of the listed tokens."""

    loss: Tensor  # ()
    kl: Tensor  # (B, T) or (N,), float32, 0 where the mask is False
    student_mass: Tensor  # (B, T) or (N,)
    teacher_mass: Tensor  # (B, T) or (N,)


class TopkRule(NamedTuple):
    """The divergence as the kernels receive it."""

    direction: int  # index in DIRECTIONS
    lump: bool
    beta: float


@dataclass(frozen=True)
class TopkRows:
    """The teacher's tokens of each row, and the row's weight in the loss; contiguous."""

    rule: TopkRule
    ids: Tensor  # (N, K), int64
    logprobs: Tensor  # (N, K), float32; -inf: the entry is unused
    row_weight: Tensor | None  # (N,), float32; None: 1

    def rows(self, index: Tensor | slice) -> "TopkRows":
        """Return the rows that `index` selects."""
        weight = None if self.row_weight is None else self.row_weight[index].contiguous()
        return TopkRows(self.rule, self.ids[index].contiguous(), self.logprobs[index].contiguous(), weight)


class TokenKernels(Protocol):
    """A part of `backend.Kernels`. Tensors are contiguous, float32 and on one device, unless a method states otherwise."""

    def importance_weights(
        self, logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, advantages: Tensor | None, sequences: Sequences,
        level: int, action: int, statistic: int, low: float, high: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return weights, the mask of the tokens that remain, and the metrics of IMPORTANCE_METRICS.

        `level`, `action` and `statistic` are indices in the tuples above. Off: low -inf, high inf. With `advantages`, only
        tokens with a negative one are rejected.
        """
        ...

    def top_entropy_mask(self, entropy: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Return the mask of the tokens that remain, and the metrics of ENTROPY_METRICS."""
        ...

    def topk_epilogue(self, x: LogitRows, topk: TopkRows, found: Tensor, out: Tensor) -> Tensor:
        """Compute `found`, write the gradient of the logits to `out`, return which rows have one, bool (N,).

        `found` (3, N) are the divergence, the student's mass and the teacher's mass. The ids of `x` are not read. Rows without
        a gradient are not written on a CPU, and get zeros on other devices. `out` as that of `ppo_epilogue`.
        """
        ...
