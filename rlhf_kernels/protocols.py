"""Launchers that select and weight tokens, a part of `backend.Kernels`.

Legend: N tokens, B sequences.
"""

from typing import Protocol

from torch import Tensor

from .launch_args import Sequences


class SelectionKernels(Protocol):
    """Tensors are contiguous, float32 and on one device, as those of `backend.Kernels`."""

    def importance_weights(
        self, logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, advantages: Tensor | None, sequences: Sequences,
        level: int, action: int, statistic: int, low: float, high: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return weights, the mask of the tokens that remain, and the metrics of IMPORTANCE_METRICS.

        `level`, `action` and `statistic` are indices in the tuples of launch_args. Off: low -inf, high inf. With `advantages`,
        only tokens with a negative one are rejected.
        """
        ...

    def top_entropy_mask(self, entropy: Tensor, mask: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Return the mask of the tokens that remain, and the metrics of ENTROPY_METRICS."""
        ...
