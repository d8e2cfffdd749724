"""Rollout state in fixed-address device tensors: the slot of each sequence and its tokens, log-probs and values so far.

A CUDA graph of a decode step includes the updates of this state. Slots without a sequence write to a spare row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_engine.config import RolloutConfig
from rlhf_engine.rollout.rollout import Rollout
from rlhf_engine.rollout.stopping import EOS, LENGTH, STOP_STRING, STOP_TOKEN, StopStrings


@dataclass
class ActiveSlots:
    """The sequences in the first `count` slots. All tensors are (slots,), int64, at fixed addresses for CUDA graphs."""

    token: Tensor  # the last token, not yet read by the trunk
    position: Tensor  # its position
    row: Tensor  # the row of its prompt in the rollout; `spare_row` in slots without a sequence
    step: Tensor  # actions so far
    spare_row: int
    count: int = 0

    @classmethod
    def of(cls, slots: int, spare_row: int, device: torch.device) -> ActiveSlots:
        """Return `slots` empty slots."""
        token, position, row, step = (torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(4))
        return cls(token, position, row, step, spare_row)

    def vectors(self) -> tuple[Tensor, ...]:
        """Return all tensors."""
        return self.token, self.position, self.row, self.step

    def keep(self, count: int) -> None:
        """Clear the slots from `count` on."""
        self.count = count
        for vector in self.vectors():
            vector[count:] = self.spare_row if vector is self.row else 0

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Clear all slots inside the `with` block and restore them at its end."""
        kept, count = [vector.clone() for vector in self.vectors()], self.count
        self.keep(0)
        try:
            yield
        finally:
            for vector, before in zip(self.vectors(), kept, strict=True):
                vector.copy_(before)
            self.count = count


class RolloutState:
    """Tokens, log-probs and values sampled so far, indexed by prompt and step, for up to `capacity` prompts.

    Row `capacity` is spare: slots without a sequence write to it.
    """

    def __init__(
        self,
        capacity: int,
        slots: int,
        columns: int,
        config: RolloutConfig,
        *,
        eos_token_ids: Tensor,
        pad_token_id: int,
        stop_token_id: int | None,
        stops: StopStrings | None,
        stop_ids: Tensor | None = None,
    ) -> None:
        self.config, self.capacity, self.pad_token_id = config, capacity, pad_token_id
        self.eos_token_ids, self.stop_token_id, self.stops = eos_token_ids, stop_token_id, stops
        self.stop_ids = stop_ids
        device, shape = eos_token_ids.device, (capacity + 1, config.max_response_tokens)
        self.sequence, self.lengths, self.stop_reason, self.prompt_lengths = (
            torch.zeros(capacity + 1, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs, self.sampling_logprobs, self.values = (torch.zeros(shape, device=device) for _ in range(3))
        self.finished = torch.zeros(slots, dtype=torch.bool, device=device)  # per slot: the last action ended it
        self.ended = torch.zeros((), dtype=torch.int64, device=device)
        self.history: Tensor | None = None
        if self.config.repetition_penalty != 1.0:
            # The ids of prompt and response. Unused columns repeat the first id, which does not change the penalty.
            self.history = torch.zeros(capacity + 1, columns, dtype=torch.int64, device=device)

    def begin(self, prompts: list[Tensor], sequence: Tensor) -> None:
        """Reset the state for new prompts; `sequence` (B,) holds the number of each prompt's sequence in the run."""
        self.prompts, self.count = prompts, len(prompts)
        self.sequence[: self.count] = sequence.to(self.sequence.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.prompt_lengths[: self.count] = lengths.to(self.sequence.device)
        self.ids.fill_(self.pad_token_id)
        for tensor in (self.logprobs, self.sampling_logprobs, self.values, self.lengths):
            tensor.zero_()
        self.stop_reason.fill_(LENGTH)
        if self.history is not None:
            for row, prompt in enumerate(prompts):
                self.history[row] = prompt[0]
                self.history[row, : len(prompt)] = prompt

    def sampling_inputs(self, active: ActiveSlots, slots: slice) -> tuple[Tensor, ...]:
        """Return the sequence number and step of each slot and, with a repetition penalty, its ids so far."""
        row, step = active.row[slots], active.step[slots]
        return self.sequence[row], step, *(() if self.history is None else (self.history[row],))

    def append(
        self,
        ids: Tensor,  # (N,), and so the next three
        logprobs: Tensor,
        sampling_logprobs: Tensor,
        values: Tensor,
        active: ActiveSlots,
        slots: slice,
    ) -> None:
        """Append one action to the sequence in each of N slots, without waiting for the device."""
        row, step = active.row[slots].clone(), active.step[slots].clone()
        live = row < self.capacity
        self.ids[row, step], self.logprobs[row, step] = ids, logprobs
        self.sampling_logprobs[row, step], self.values[row, step] = sampling_logprobs, values
        if self.history is not None:
            self.history[row, self.prompt_lengths[row] + step] = ids
        active.token[slots] = ids
        active.position[slots] += live
        active.step[slots] += live
        reason = self._stop_reasons(ids, step)
        self.stop_reason[row], self.lengths[row] = reason, step + 1
        self.finished[slots] = live & ((reason != LENGTH) | (step + 1 == self.config.max_response_tokens))
        self.ended.copy_(self.finished[slots].sum())

    def _stop_reasons(self, ids: Tensor, step: Tensor) -> Tensor:  # (N,), int64
        """Return the stop reason of each response at this action; LENGTH unless it is a token that ends a response."""
        reason = torch.full_like(ids, LENGTH)
        if self.stop_ids is not None:
            reason.masked_fill_((ids[:, None] == self.stop_ids).any(1), STOP_STRING)
        if self.stop_token_id is not None:
            stopped = (ids == self.stop_token_id) & (step >= self.config.stop_after)
            reason.masked_fill_(stopped, STOP_TOKEN)
        return reason.masked_fill((ids[:, None] == self.eos_token_ids).any(1), EOS)

    def count_ended(self, active: ActiveSlots, first: int) -> int:
        """Return how many sequences in slots `first` to `active.count` ended with their last action. Waits for the device."""
        if self.stops is None:
            return int(self.ended)
        slots = slice(first, active.count)
        row = active.row[slots]
        responses = zip(self.ids[row].tolist(), self.lengths[row].tolist(), strict=True)
        found = [self.stops.found(response[:length]) for response, length in responses]
        stopped = torch.tensor(found, device=row.device) & (self.stop_reason[row] == LENGTH)
        self.stop_reason[row] = self.stop_reason[row].masked_fill(stopped, STOP_STRING)
        self.finished[slots] |= stopped
        return int(self.finished[slots].sum())

    def restart(self, row: Tensor) -> None:
        """Erase the responses to these prompts."""
        self.ids[row] = self.pad_token_id
        for tensor in (self.logprobs, self.sampling_logprobs, self.values, self.lengths):
            tensor[row] = 0
        if self.history is not None:
            for index in row.tolist():
                self.history[index, len(self.prompts[index]) :] = self.prompts[index][0]

    def rollout(self) -> Rollout:
        """Return the sampled batch as a copy, because the next rollout reuses this state."""
        everyone = slice(0, self.count)
        lengths = self.lengths[everyone]
        width = int(lengths.max())
        return Rollout(
            prompt_ids=pad_sequence(self.prompts, batch_first=True, padding_value=self.pad_token_id),
            prompt_lengths=self.prompt_lengths[everyone].clone(),
            response_ids=self.ids[everyone, :width].clone(),
            mask=torch.arange(width, device=lengths.device) < lengths[:, None],
            logprobs=self.logprobs[everyone, :width].clone(),
            sampling_logprobs=self.sampling_logprobs[everyone, :width].clone(),
            values=self.values[everyone, :width].clone(),
            stop_reason=self.stop_reason[everyone].clone(),
            numbers=self.sequence[everyone].clone(),
        )
