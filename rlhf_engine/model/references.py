"""The reference of a policy with adapters: the policy without the adapter that is trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_engine.model.actor_critic import LanguageModel
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.roles import REFERENCE


class AdapterOff:
    """A reference that is the policy with the adapter that it started with, or without one, and needs no copy of the weights.

    Its log-probs have the bits of that starting policy, because the frozen weights and the starting adapter do not change.

    Raises:
        ValueError: the policy has no adapters.
    """

    def __init__(self, policy: LanguageModel) -> None:
        if policy.adapters is None:
            raise ValueError(
                "policy: got a model without adapters, expected one with; use a FrozenCopy of it as the reference"
            )
        self.policy, self.adapters = policy, policy.adapters
        self.adapter = REFERENCE if REFERENCE in policy.adapters.names else None

    @property
    def packs(self) -> bool:
        """Whether micro-batches with a token budget are packed without padding."""
        return self.policy.packs

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch, *, temperature: float) -> Tensor:  # (N,), float32
        """Return the log-probs of a batch's actions."""
        found = self.policy(batch, ("logprobs",), temperature=temperature, adapter=self.adapter).logprobs
        assert found is not None
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the starting adapter. An adapter's folder has the fingerprint of the other weights."""
        return iter(() if self.adapter is None else self.adapters.tensors(self.adapter).items())
