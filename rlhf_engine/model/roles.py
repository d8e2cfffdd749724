"""The four roles of a PPO update: policy, value function, reference, reward.

The trainer, scoring and sampling depend only on these protocols. A new kind of value function or reference is a new
class. Code that uses a role never checks its class.
Shapes: B sequences, N actions of a batch, H hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from rlhf_engine.model.balance import RouterBalance
from rlhf_engine.model.layout import TokenBatch
from rlhf_kernels import PPOLoss

POLICY, REFERENCE, VALUE, REWARD = "policy", "reference", "value", "reward"
"""Names of the roles' adapters."""

Want = Literal["hidden", "logits", "logprobs", "entropy", "values", "loss", "balance"]
"""What a forward pass of a policy can return."""


@dataclass(frozen=True)
class Outputs:
    """The requested results of a forward pass; the others are None. The N states are those of `batch.rows`."""

    hidden: Tensor | None = None  # (N, H)
    logits: Tensor | None = None  # (N, V), not divided by the temperature
    logprobs: Tensor | None = None  # (N,), float32
    entropy: Tensor | None = None  # (N,), float32
    values: Tensor | None = None  # (N,), float32
    loss: PPOLoss | None = None
    balance: Tensor | None = None  # (), the balancing loss of experts times its coefficient; None without one


@runtime_checkable
class ValueFunction(Protocol):
    """Value estimates of the states in which a batch's actions are chosen."""

    shares_trunk: bool
    """Whether it reads the policy's hidden states; otherwise it runs its own trunk for each batch."""

    saved_as: str
    """A file that `save_value` writes, relative to the policy's folder."""

    def batch_values(self, batch: TokenBatch, hidden: Tensor | None) -> Tensor:  # (N,), float32
        """Return the values of a batch's states. `hidden` (N, H) is the policy's; None if `shares_trunk` is False."""
        ...

    def loss_inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the value arguments of `linear_ppo_loss`: the weights of a head, or values with a gradient."""
        ...

    @property
    def packs(self) -> bool:
        """Whether micro-batches with a token budget are packed without padding."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights."""
        ...

    def check_packing(self) -> None:
        """Raise ValueError if packed sequences affect each other."""

    def save_value(self, folder: Path) -> None:
        """Write the value function into the folder of a policy, where `load_policy` finds it."""


class Policy(Protocol):
    """The model that is trained and sampled from."""

    value: ValueFunction | None
    backend: str
    """Backend of the kernels."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the matrix products, and of keys and values."""
        ...

    packs: bool
    """Whether micro-batches with a token budget are packed without padding."""
    balance: RouterBalance | None
    """The balancing loss of experts that is added to the policy's loss."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the weights, including those of the value function."""
        ...

    def __call__(
        self,
        batch: TokenBatch,
        want: Collection[Want],
        *,
        temperature: float = 1.0,
        loss: Mapping[str, Any] | None = None,
    ) -> Outputs:
        """Run the trunk once and return what `want` names, for the states `batch.rows`."""
        ...


class Reference(Protocol):
    """The policy relative to which the KL penalty is measured."""

    @property
    def packs(self) -> bool:
        """Whether micro-batches with a token budget are packed without padding."""
        ...

    def shared_states(self, batch: TokenBatch) -> Tensor | None:  # (B, S, H)
        """Return the `states` of a batch from which passes of both policy and reference begin; None: at the tokens."""
        ...

    def logprobs(self, batch: TokenBatch, *, temperature: float) -> Tensor:  # (N,), float32
        """Return the log-probs of a batch's actions, without a gradient."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the names and tensors that determine the log-probs, for a fingerprint."""
        ...


Rollout = TypeVar("Rollout", contravariant=True)


class Reward(Protocol[Rollout]):
    """One score per response."""

    def __call__(self, rollout: Rollout, /) -> Tensor:  # (B,), float
        """Return a score for each response of a rollout."""
        ...
