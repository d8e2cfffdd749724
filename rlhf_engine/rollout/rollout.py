"""`Rollout`, the batch of sampled responses that PPO trains on, and recomputation of its log-probs.

B sequences, P prompt width, T response width, N actions of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.distributed.ranks import ONE, Ranks
from rlhf_engine.model.layout import TokenBatch, input_places, token_batch, token_cuts
from rlhf_engine.model.roles import Policy, Reference, Want
from rlhf_engine.rollout.stopping import LENGTH


def rollout_bytes(tokens: int, actions: int, *, sampling: bool = False) -> int:
    """Return the bytes of a `Rollout` with `tokens` = B (P + T) and `actions` = B T, without its (B,) tensors.

    With `sampling`, include the second copy of the response ids that `RolloutState` holds during sampling.
    """
    ids, number = torch.int64.itemsize, torch.float32.itemsize
    by_action = torch.bool.itemsize + 3 * number  # mask, logprobs, sampling_logprobs, values
    return tokens * ids + actions * (by_action + sampling * ids)


@dataclass(frozen=True)
class Rollout:
    """Prompts and responses, both padded on the right, with the log-probs and values of the policy that sampled them."""

    prompt_ids: Tensor  # (B, P), int64
    prompt_lengths: Tensor  # (B,), int64
    response_ids: Tensor  # (B, T), int64
    mask: Tensor  # (B, T), bool, True for actions, EOS included
    logprobs: (
        Tensor  # (B, T), float32, under the softmax over the full vocabulary at the temperature; 0 outside the mask
    )
    sampling_logprobs: Tensor  # (B, T), float32, under the renormalized kept set that was sampled from
    values: Tensor  # (B, T), float32, V of the state before the action
    stop_reason: Tensor  # (B,), int64, index in `STOP_REASONS` of the reason why the response ended
    numbers: Tensor | None = None  # (B,), int64, number of each sequence in the run
    states: Tensor | None = (
        None  # (inputs of all sequences, H), input of the first trained layer, sequence after sequence
    )

    @property
    def ended(self) -> Tensor:  # (B,), bool
        """True where EOS, a stop token or a stop string ended the response, False where the token limit did."""
        return self.stop_reason != LENGTH

    @property
    def response_lengths(self) -> Tensor:  # (B,)
        """Number of actions per sequence."""
        return self.mask.sum(1)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def prompts(self) -> list[list[int]]:
        """Return the ids of every prompt, without padding."""
        return _unpadded(self.prompt_ids, self.prompt_lengths)

    def responses(self) -> list[list[int]]:
        """Return the ids of every response, without padding."""
        return _unpadded(self.response_ids, self.response_lengths)

    def take(self, sequences: Tensor) -> Rollout:
        """Return a rollout with only these sequences."""
        every = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "states"}
        rows: dict[str, Any] = {name: None if tensor is None else tensor[sequences] for name, tensor in every.items()}
        if self.states is None:
            return Rollout(**rows)
        places, _ = input_places(self.input_lengths, sequences, packed=True)
        return Rollout(**rows, states=self.states[places[0]])

    @property
    def input_lengths(self) -> Tensor:  # (B,)
        """Number of inputs of a forward pass per sequence: all tokens but the last action."""
        return self.prompt_lengths + self.response_lengths - 1

    def batch(self, sequences: Tensor, *, packed: bool = False) -> TokenBatch:
        """Return the input of a forward pass over these sequences."""
        tokens = (self.prompt_ids, self.prompt_lengths, self.response_ids, self.response_lengths)
        batch = token_batch(*tokens, sequences, packed=packed)
        if self.states is None:
            return batch
        places, _ = input_places(self.input_lengths, sequences, packed=packed)
        return replace(batch, states=self.states[places])

    def by_length(
        self, sequences: Tensor, microbatch: int, microbatch_tokens: int | None = None, *, packed: bool = False
    ) -> tuple[Tensor, ...]:
        """Split `sequences` into micro-batches of similar lengths, which reduces padding.

        A micro-batch has `microbatch` sequences or, if `microbatch_tokens` is given, as many as fit into that number of input
        tokens. Padding counts as tokens unless `packed`.
        """
        lengths = (self.prompt_lengths + self.response_lengths)[sequences]
        order = lengths.argsort(stable=True, descending=True)
        if microbatch_tokens is None:
            return sequences[order].split(microbatch)
        cuts = token_cuts((lengths[order] - 1).tolist(), microbatch_tokens, packed=packed)
        return sequences[order].split(cuts)

    def parts(
        self,
        sequences: Tensor,
        microbatch: int,
        microbatch_tokens: int | None = None,
        *,
        packed: bool = False,
        ranks: Ranks = ONE,
    ) -> Iterator[tuple[Tensor, bool]]:
        """Yield the sequences of every micro-batch of `by_length` that this rank computes, each with True.

        A rank that has fewer than a different rank repeats a sequence with False, because every rank must run the same
        number of passes: the weights of a pass may be sharded over all ranks.
        """
        lengths = (self.prompt_lengths + self.response_lengths)[sequences]
        every = [
            [
                members
                for members in self.by_length(sequences[rows], microbatch, microbatch_tokens, packed=packed)
                if len(members)
            ]
            for rows in ranks.shares(lengths)
        ]
        ours = every[ranks.rank]
        yield from ((members, True) for members in ours)
        for _ in range(max(map(len, every)) - len(ours)):
            yield sequences[:1], False

    def batches(
        self,
        sequences: Tensor,
        microbatch: int,
        microbatch_tokens: int | None = None,
        *,
        packed: bool = False,
        ranks: Ranks = ONE,
    ) -> Iterator[TokenBatch]:
        """Yield the forward pass input of every micro-batch of `parts`; those that are repeated have `counts` False.

        `packed` applies only with `microbatch_tokens`.
        """
        packed = packed and microbatch_tokens is not None
        for members, counts in self.parts(sequences, microbatch, microbatch_tokens, packed=packed, ranks=ranks):
            yield replace(self.batch(members, packed=packed), counts=counts)

    @torch.no_grad()
    def starting_from(
        self,
        reference: Reference,
        microbatch: int,
        microbatch_tokens: int | None = None,
        transients: Callable[[], AbstractContextManager[None]] = nullcontext,
        ranks: Ranks = ONE,
    ) -> Rollout:
        """Return the rollout with the states that the policy shares with its reference, or this one if they share none.

        They are computed once, in micro-batches as those of `batches`, and later passes begin with them. Each pass runs inside
        `transients()`, and the states are stored outside.
        """
        packed, states = reference.packs and microbatch_tokens is not None, None
        everyone = torch.arange(len(self), device=self.mask.device)
        for members, counts in self.parts(everyone, microbatch, microbatch_tokens, packed=packed, ranks=ranks):
            with transients():
                found = reference.shared_states(self.batch(members, packed=packed))
            if found is None:
                return self
            if states is None:
                states = found.new_zeros(int(self.input_lengths.sum()), found.shape[-1])
            places, real = input_places(self.input_lengths, members, packed=packed)
            if counts:
                states[places[real]] = found[real]
        assert states is not None
        return replace(self, states=ranks.merge(states))


def joined(own: Rollout, ranks: Ranks, shares: list[Tensor], pad_id: int) -> Rollout:
    """Return the rollout of all ranks, given this rank's and the rows of each; it has no `states`."""
    pads = {"prompt_ids": pad_id, "response_ids": pad_id}
    rows = {item.name: getattr(own, item.name) for item in fields(own) if getattr(own, item.name) is not None}
    return Rollout(**{name: ranks.join(tensor, shares, pads.get(name, 0)) for name, tensor in rows.items()})


def _unpadded(ids: Tensor, lengths: Tensor) -> list[list[int]]:
    return [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]


# ---- recomputed log-probs and values ----


@torch.no_grad()
def recompute(
    policy: Policy, rollout: Rollout, want: Collection[Want], *, temperature: float = 1.0, **size: Any
) -> dict[str, Tensor]:  # name -> (B, T)
    """Return the outputs named in `want` ("logprobs", "entropy", "values") for every action, float32 and 0 outside the mask.

    `size` is the micro-batch size: `microbatch`, `microbatch_tokens` and `ranks` as in `Rollout.batches`. The output layer runs
    only on the states of actions.
    """

    def of_batch(batch: TokenBatch) -> dict[str, Tensor]:
        outputs = policy(batch, want, temperature=temperature)
        return {name: getattr(outputs, name) for name in want}

    return _of_actions(rollout, of_batch, want, packed=policy.packs, **size)


@torch.no_grad()
def reference_logprobs(
    reference: Reference, rollout: Rollout, *, temperature: float = 1.0, **size: Any
) -> Tensor:  # (B, T)
    """Return the reference's log-prob of every action, float32 and 0 outside the mask; `size` as in `recompute`."""

    def of_batch(batch: TokenBatch) -> dict[str, Tensor]:
        return {"logprobs": reference.logprobs(batch, temperature=temperature)}

    return _of_actions(rollout, of_batch, ("logprobs",), packed=reference.packs, **size)["logprobs"]


def logprob_deviation(policy: Policy, rollout: Rollout, *, sequences: int, **settings: Any) -> float:
    """Return the largest absolute difference between the sampled log-probs and those of a new forward pass of the policy.

    The first `sequences` sequences of the rollout are compared. `settings` are keyword arguments of `recompute`.
    """
    checked = rollout.take(torch.arange(min(sequences, len(rollout)), device=rollout.mask.device))
    fresh = recompute(policy, checked, ("logprobs",), **settings)["logprobs"]
    return float((fresh - checked.logprobs).abs().max())


def _of_actions(
    rollout: Rollout,
    of_batch: Callable[[TokenBatch], dict[str, Tensor]],  # name -> (N,)
    names: Collection[str],
    *,
    packed: bool,
    microbatch: int,
    microbatch_tokens: int | None = None,
    ranks: Ranks = ONE,
) -> dict[str, Tensor]:  # name -> (B, T)
    found = {name: torch.zeros_like(rollout.logprobs) for name in names}
    everyone = torch.arange(len(rollout), device=rollout.mask.device)
    for batch in rollout.batches(everyone, microbatch, microbatch_tokens, packed=packed, ranks=ranks):
        for name, values in of_batch(batch).items():
            if batch.counts:
                found[name].view(-1)[batch.source] = values
    return {name: ranks.merge(values) for name, values in found.items()}
