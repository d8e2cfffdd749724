"""References: a copy of the policy, and those that share its weights: without the adapter or the updates of its top layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import functional_call

from rlhf_engine.model.actor_critic import LanguageModel, frozen
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.roles import POLICY, REFERENCE
from rlhf_engine.model.top_layers import in_top


class FrozenCopy:
    """A reference with a copy of the policy's weights at construction."""

    def __init__(self, policy: LanguageModel) -> None:
        self.model = frozen(policy, without=policy.value)

    @property
    def packs(self) -> bool:
        """Whether micro-batches with a token budget are packed without padding."""
        return self.model.packs

    def shared_states(self, batch: TokenBatch) -> None:
        """Return None: a copy shares no computation with the policy."""

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch, *, temperature: float) -> Tensor:  # (N,), float32
        """Return the log-probs of a batch's actions."""
        return self.model(batch, ("logprobs",), temperature=temperature).logprobs

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the names and tensors of the language model."""
        return self.model.model.named_parameters()


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

    def shared_states(self, batch: TokenBatch) -> Tensor | None:
        """Return None: the adapter of the policy may be in every layer."""

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch, *, temperature: float) -> Tensor:  # (N,), float32
        """Return the log-probs of a batch's actions."""
        found = self.policy(batch, ("logprobs",), temperature=temperature, adapter=self.adapter).logprobs
        assert found is not None
        return found

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the starting adapter. An adapter's folder has the fingerprint of the other weights."""
        return iter(() if self.adapter is None else self.adapters.tensors(self.adapter).items())


class Hydra:
    """A reference that shares the policy's frozen lower layers, whose output both read, and has a copy of what is trained.

    A call runs the policy with the copies in place of the weights of its top layers, final norm and untied output layer. With
    adapters it has no copies and uses the adapter that the policy started with, or none. The name is that of the reference
    with two heads on one trunk in trlX.

    Raises:
        ValueError: the policy trains all layers, balances experts, or has top layers that read more than the output of those
            below.
    """

    def __init__(self, policy: LanguageModel) -> None:
        if policy.top is None:
            raise ValueError(
                "ppo.reference: got 'hydra' for a policy that trains all layers, expected 'frozen_copy'; set "
                "model.train_layers, or call train_top, to train only the top ones"
            )
        if policy.balance is not None:
            raise ValueError(
                "ppo.reference: got 'hydra', or 'auto' with model.train_layers, for a model with the balancing loss of "
                "experts, which reads the routers of all layers; set ppo.reference to frozen_copy or model.router_aux_loss to "
                "false"
            )
        top = policy.top
        for name, places in ({} if policy.adapters is None else policy.adapters.places).items():
            if name in (POLICY, REFERENCE) and in_top(policy.model, places) != places:
                raise ValueError(
                    f"policy: got the adapter {name!r} in layers below the trained ones, expected it in the top layers only; "
                    "call train_top before Adapters.start"
                )
        top.check_split(policy.trunk, policy.compute_dtype)
        self.policy, self.lower = policy, top.lower
        self.adapter_off = None if policy.adapters is None else AdapterOff(policy)
        self.frozen: dict[str, Tensor] = {}
        """Copies of the trained weights by their names in the policy; none with adapters."""
        if self.adapter_off is None:
            trained = top.trained_tensors(policy.model)
            self.frozen = {f"model.{name}": weight.detach().clone() for name, weight in trained}

    @property
    def packs(self) -> bool:
        """Whether micro-batches with a token budget are packed without padding."""
        return self.policy.packs

    def shared_states(self, batch: TokenBatch) -> Tensor | None:  # (B, S, H)
        """Return the output of the frozen layers; None if only the embedding is frozen."""
        return self.policy.states_below(batch) if self.lower else None

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch, *, temperature: float) -> Tensor:  # (N,), float32
        """Return the log-probs of a batch's actions, from `batch.states` on if they are given."""
        if self.adapter_off is not None:
            return self.adapter_off.logprobs(batch, temperature=temperature)
        options = {"temperature": temperature}
        return functional_call(self.policy, self.frozen, (batch, ("logprobs",)), options).logprobs

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the names and tensors that determine the log-probs."""
        if self.adapter_off is not None:
            return self.adapter_off.weights()
        named = self.policy.model.named_parameters()
        return ((name, self.frozen.get(f"model.{name}", weight)) for name, weight in named)
