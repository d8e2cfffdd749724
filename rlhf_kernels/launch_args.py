"""What every backend's kernels take: rows of logits, the per-token inputs of the objective, and how to read their results.

Legend: N tokens, V vocabulary, B sequences, T positions.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

OBJECTIVES = ("clip", "kl_penalty", "ratio", "policy_gradient")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
"""Choices that the kernels know by their place here (csrc/math)."""


@dataclass(frozen=True)
class Transform:
    """`z = softcap * tanh(logit_scale * u / softcap) / temperature`."""

    temperature: float | Tensor = 1.0  # or (N,), float32
    softcap: float | None = None
    logit_scale: float = 1.0

    def rows(self, index: Tensor | slice) -> "Transform":
        if not isinstance(self.temperature, Tensor):
            return self
        return replace(self, temperature=self.temperature[index])


@dataclass(frozen=True)
class LogitRows:
    """Rows of logits seen as (N, V), with what was taken in each."""

    logits: Tensor  # (N, V) or (B, T, V); unit stride along V, any other strides
    ids: Tensor  # (N,), int64
    transform: Transform
    mask: Tensor | None = None  # (N,), bool

    def layout(self) -> tuple[int, int, int, int, int]:
        """N, V, row stride, inner, outer stride: row r lies at `r // inner * outer + r % inner * row`, in elements."""
        vocab = self.logits.shape[-1]
        n = self.logits.numel() // vocab
        inner, outer = (n, 0) if self.logits.dim() == 2 else (self.logits.shape[1], self.logits.stride(0))
        return n, vocab, self.logits.stride(-2), max(inner, 1), outer


@dataclass(frozen=True)
class RowStats:
    """What one read of a row leaves behind: log-prob, entropy, shift, 1 / sum; `p_j = exp((w_j - shift) * factor) / sum`."""

    buffer: Tensor  # (4, N), float32

    @classmethod
    def empty(cls, n: int, device: torch.device) -> "RowStats":
        return cls(torch.empty(4, n, dtype=torch.float32, device=device))

    @property
    def logprobs(self) -> Tensor:
        return self.buffer[0]

    @property
    def entropy(self) -> Tensor:
        return self.buffer[1]


@dataclass(frozen=True)
class PpoScalars:
    """The numbers of the objective, as the kernels want them: None is gone."""

    objective: str
    kl_estimator: str
    cliprange: float
    cliprange_high: float
    dual_clip: float  # inf: off
    log_ratio_clamp: float  # inf: off
    old_kl_coef: float
    kl_coef: float
    entropy_coef: float
    cliprange_value: float  # inf: off


@dataclass(frozen=True)
class PpoRows:
    """Per-token constants of the objective, each (N,) float32 and contiguous."""

    scalars: PpoScalars
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor | None
    ref_logprobs: Tensor | None
    row_weight: Tensor | None

    def rows(self, index: Tensor | slice) -> "PpoRows":
        def take(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[index].contiguous()

        return PpoRows(
            self.scalars,
            take(self.old_logprobs),
            take(self.advantages),
            take(self.weights),
            take(self.ref_logprobs),
            take(self.row_weight),
        )


@dataclass(frozen=True)
class Sequences:
    """Where sequences lie among N flat tokens: `cu_seqlens`, or `count` rows of `length`."""

    count: int
    length: int
    cu_seqlens: Tensor | None  # (B + 1,), int32

    @classmethod
    def of(cls, tokens: Tensor, cu_seqlens: Tensor | None) -> "Sequences":
        if cu_seqlens is not None:
            return cls(cu_seqlens.numel() - 1, 0, cu_seqlens.contiguous())
        return cls(*(tokens.shape if tokens.dim() == 2 else (1, tokens.numel())), None)

    def check(self, n: int) -> None:
        """ValueError unless the sequences lie inside the `n` tokens and cover them; looks at values."""
        if self.cu_seqlens is None:
            return
        ends = self.cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != n or ends != sorted(ends):
            raise ValueError(f"cu_seqlens: got {ends}, expected 0 <= ... <= {n}, from 0 to N and never falling")

    def check_on_cpu(self, tokens: Tensor) -> None:
        """`check`, where looking at values waits for no device."""
        if tokens.device.type == "cpu":
            self.check(tokens.numel())

    def lengths(self, mask: Tensor) -> Tensor:
        """True tokens of each sequence, shape (B,), int64."""
        if self.cu_seqlens is None:
            return mask.view(self.count, self.length).sum(1)
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        return before[self.cu_seqlens.long()].diff()

    def per_token(self, x: Tensor, n: int) -> Tensor:  # (B,) -> (N,)
        if self.cu_seqlens is None:
            return x.repeat_interleave(self.length)
        # With its size said beforehand, a device is not asked for it.
        return x.repeat_interleave(self.cu_seqlens.diff(), output_size=n)
