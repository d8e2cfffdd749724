"""What sampling hands to learning. B sequences, P prompt width, T response width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from rlhf_engine.model.layout import TokenBatch, token_batch, token_cuts
from rlhf_engine.rollout.stopping import LENGTH


def rollout_bytes(tokens: int, actions: int, *, sampling: bool = False) -> int:
    """Return the bytes of a `Rollout` of B (P + T) tokens and B T actions, without its (B,) tensors.

    While it is sampled, `RolloutState` holds the ids of the responses once more.
    """
    ids, number = torch.int64.itemsize, torch.float32.itemsize
    by_token = 2 * ids  # input_ids, attention_mask
    by_action = torch.bool.itemsize + 3 * number  # mask, logprobs, sampling_logprobs, values
    return tokens * by_token + actions * (by_action + sampling * ids)


@dataclass(frozen=True)
class Rollout:
    """Prompts padded on the left, responses padded on the right, and what the policy said while it sampled them."""

    input_ids: Tensor  # (B, P + T), int64
    attention_mask: Tensor  # (B, P + T), int64, 1 for prompt and response tokens
    response_ids: Tensor  # (B, T), int64, a view of input_ids
    mask: Tensor  # (B, T), bool, True for actions, EOS among them
    logprobs: Tensor  # (B, T), float32, full tempered softmax; 0 where the mask is False
    sampling_logprobs: Tensor  # (B, T), float32, of the kept set that was sampled from
    values: Tensor  # (B, T), float32, V of the state in which the action was taken
    stop_reason: Tensor  # (B,), int64, why each response ended: its place in `STOP_REASONS`

    @property
    def ended(self) -> Tensor:  # (B,), bool
        """True where a response came to its end, by EOS, a stop token or a stop string, before its budget did."""
        return self.stop_reason != LENGTH

    @property
    def response_lengths(self) -> Tensor:  # (B,)
        """Actions of every sequence."""
        return self.mask.sum(1)

    @property
    def prompt_lengths(self) -> Tensor:  # (B,)
        """Prompt tokens of every sequence, padding not counted."""
        return self.attention_mask[:, : -self.response_ids.shape[1]].sum(1)

    @property
    def prompt_ids(self) -> Tensor:  # (B, P)
        """Prompts, padded on the left."""
        return self.input_ids[:, : -self.response_ids.shape[1]]

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, sequences: Tensor) -> Rollout:
        """A rollout of these sequences alone."""
        taken = {item.name: getattr(self, item.name)[sequences] for item in fields(self)}
        width = self.response_ids.shape[1]
        return Rollout(**taken | {"response_ids": taken["input_ids"][:, -width:]})

    def batch(self, sequences: Tensor, *, packed: bool = False) -> TokenBatch:
        """The sequences of a micro-batch as a forward pass reads them."""
        width = self.response_ids.shape[1]
        return token_batch(self.input_ids, self.prompt_lengths, self.response_lengths, width, sequences, packed=packed)

    def by_length(
        self, sequences: Tensor, microbatch: int, microbatch_tokens: int | None = None, *, packed: bool = False
    ) -> tuple[Tensor, ...]:
        """Split `sequences` into micro-batches whose members have similar lengths, so that few pads remain.

        Each has `microbatch` sequences, or as many as `microbatch_tokens` inputs hold, padding among them unless `packed`.
        """
        lengths = (self.prompt_lengths + self.response_lengths)[sequences]
        order = lengths.argsort(stable=True, descending=True)
        if microbatch_tokens is None:
            return sequences[order].split(microbatch)
        cuts = token_cuts((lengths[order] - 1).tolist(), microbatch_tokens, packed=packed)
        return sequences[order].split(cuts)

    def batches(
        self, sequences: Tensor, microbatch: int, microbatch_tokens: int | None = None, *, packed: bool = False
    ) -> Iterator[TokenBatch]:
        """The micro-batches of `by_length` as forward passes read them; those of a number of sequences are never packed."""
        packed = packed and microbatch_tokens is not None
        for members in self.by_length(sequences, microbatch, microbatch_tokens, packed=packed):
            yield self.batch(members, packed=packed)
