"""What sampling hands to learning. B sequences, P prompt width, T response width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_engine.model.layout import TokenBatch, token_batch


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
    ended: Tensor  # (B,), bool: True by EOS, False by running out of budget

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

    def batch(self, sequences: Tensor) -> TokenBatch:
        """The sequences of a micro-batch as a forward pass reads them."""
        width = self.response_ids.shape[1]
        return token_batch(self.input_ids, self.prompt_lengths, self.response_lengths, width, sequences)

    def by_length(self, sequences: Tensor, size: int) -> tuple[Tensor, ...]:
        """Split `sequences` into micro-batches of `size` whose members have similar lengths, so that few pads remain."""
        lengths = (self.prompt_lengths + self.response_lengths)[sequences]
        return sequences[lengths.argsort(stable=True, descending=True)].split(size)


def join(rollouts: list[Rollout], pad_token_id: int) -> Rollout:
    """One rollout of all sequences, in order, padded to the widest."""
    prompt = max(r.prompt_ids.shape[1] for r in rollouts)
    response = max(r.response_ids.shape[1] for r in rollouts)

    def widen(x: Tensor, left: int, right: int, fill: float = 0) -> Tensor:
        return torch.nn.functional.pad(x, (left, right), value=fill)

    def along(name: str, fill: float = 0) -> Tensor:
        return torch.cat([widen(getattr(r, name), 0, response - r.mask.shape[1], fill) for r in rollouts])

    def whole(name: str, fill: float = 0) -> Tensor:
        return torch.cat(
            [
                widen(getattr(r, name), prompt - r.prompt_ids.shape[1], response - r.mask.shape[1], fill)
                for r in rollouts
            ]
        )

    input_ids = whole("input_ids", pad_token_id)
    return Rollout(
        input_ids=input_ids,
        attention_mask=whole("attention_mask"),
        response_ids=input_ids[:, prompt:],
        mask=along("mask"),
        logprobs=along("logprobs"),
        sampling_logprobs=along("sampling_logprobs"),
        values=along("values"),
        ended=torch.cat([r.ended for r in rollouts]),
    )
