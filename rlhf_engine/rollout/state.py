"""The books of a rollout, on the device and at fixed addresses: which sequence is in which slot, and all that was said.

A graph that holds a decode step keeps them too, rows without a sequence included, whose entries go to a row that is nobody's.
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
    """The sequences in the first `count` slots. All tensors are (slots,), int64; a graph knows their addresses."""

    token: Tensor  # the last token, not yet read by the trunk
    position: Tensor  # its position
    row: Tensor  # the prompt that it answers; `nobody` in slots without a sequence
    step: Tensor  # actions taken
    nobody: int
    count: int = 0

    @classmethod
    def of(cls, slots: int, nobody: int, device: torch.device) -> ActiveSlots:
        return cls(*(torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(4)), nobody)

    def vectors(self) -> tuple[Tensor, ...]:
        return self.token, self.position, self.row, self.step

    def keep(self, count: int) -> None:
        """Slots at `count` and beyond have no sequence."""
        self.count = count
        for vector in self.vectors():
            vector[count:] = self.nobody if vector is self.row else 0

    @contextmanager
    def idle(self) -> Iterator[None]:
        """No slot has a sequence, whatever is done to them meanwhile."""
        kept, count = [vector.clone() for vector in self.vectors()], self.count
        self.keep(0)
        try:
            yield
        finally:
            for vector, before in zip(self.vectors(), kept, strict=True):
                vector.copy_(before)
            self.count = count


class RolloutState:
    """Everything said while sampling, by prompt and step, of up to `most` prompts.

    Row `most`, nobody's, takes what slots without a sequence say.
    """

    def __init__(
        self,
        most: int,
        slots: int,
        columns: int,
        config: RolloutConfig,
        *,
        eos_token_ids: Tensor,
        pad_token_id: int,
        stop_token_id: int | None,
        stops: StopStrings | None,
    ) -> None:
        self.config, self.most, self.pad_token_id = config, most, pad_token_id
        self.eos_token_ids, self.stop_token_id, self.stops = eos_token_ids, stop_token_id, stops
        device, shape = eos_token_ids.device, (most + 1, config.max_response_tokens)
        self.sequence, self.lengths, self.stop_reason, self.prompt_lengths = (
            torch.zeros(most + 1, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self.logprobs, self.sampling_logprobs, self.values = (torch.zeros(shape, device=device) for _ in range(3))
        self.finished = torch.zeros(slots, dtype=torch.bool, device=device)  # by slot, in the last action
        self.ended = torch.zeros((), dtype=torch.int64, device=device)
        self.history: Tensor | None = None
        if self.config.repetition_penalty != 1.0:
            # A prompt's ids and then the response's; what is behind them repeats the first one and changes nothing.
            self.history = torch.zeros(most + 1, columns, dtype=torch.int64, device=device)

    def begin(self, prompts: list[Tensor], sequence: Tensor) -> None:
        """Nothing said yet."""
        self.prompts, self.count = prompts, len(prompts)
        self.sequence[: self.count] = sequence.to(self.sequence.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.prompt_lengths[: self.count] = lengths.to(self.sequence.device)
        self.ids.fill_(self.pad_token_id)
        for said in (self.logprobs, self.sampling_logprobs, self.values, self.lengths):
            said.zero_()
        self.stop_reason.fill_(LENGTH)
        if self.history is not None:
            for row, prompt in enumerate(prompts):
                self.history[row] = prompt[0]
                self.history[row, : len(prompt)] = prompt

    def streams(self, running: ActiveSlots, here: slice) -> tuple[Tensor, ...]:
        """What an action depends on beside its state: the numbers of its sequence and step, and ids that are penalised."""
        row, step = running.row[here], running.step[here]
        return self.sequence[row], step, *(() if self.history is None else (self.history[row],))

    def note(
        self,
        ids: Tensor,  # (N,), and so the next three
        logprobs: Tensor,
        sampling_logprobs: Tensor,
        values: Tensor,
        running: ActiveSlots,
        here: slice,
    ) -> None:
        """An action of each of the slots `here`; work on tensors alone."""
        row, step = running.row[here].clone(), running.step[here].clone()
        live = row < self.most
        self.ids[row, step], self.logprobs[row, step] = ids, logprobs
        self.sampling_logprobs[row, step], self.values[row, step] = sampling_logprobs, values
        if self.history is not None:
            self.history[row, self.prompt_lengths[row] + step] = ids
        running.token[here] = ids
        running.position[here] += live
        running.step[here] += live
        reason = self._why(ids, step)
        self.stop_reason[row], self.lengths[row] = reason, step + 1
        self.finished[here] = live & ((reason != LENGTH) | (step + 1 == self.config.max_response_tokens))
        self.ended.copy_(self.finished[here].sum())

    def _why(self, ids: Tensor, step: Tensor) -> Tensor:  # (N,), int64
        """Why each response ends with this action; LENGTH where nothing but its budget, or a stop string, can end it."""
        reason = torch.full_like(ids, LENGTH)
        if self.stop_token_id is not None:
            stopped = (ids == self.stop_token_id) & (step >= self.config.stop_after)
            reason.masked_fill_(stopped, STOP_TOKEN)
        return reason.masked_fill((ids[:, None] == self.eos_token_ids).any(1), EOS)

    def count_ended(self, running: ActiveSlots, first: int) -> int:
        """How many sequences the last action of the slots `first` to `running.count` ended. Waits for the device."""
        if self.stops is None:
            return int(self.ended)
        here = slice(first, running.count)
        row = running.row[here]
        said = zip(self.ids[row].tolist(), self.lengths[row].tolist(), strict=True)
        found = [self.stops.found(response[:length]) for response, length in said]
        stopped = torch.tensor(found, device=row.device) & (self.stop_reason[row] == LENGTH)
        self.stop_reason[row] = self.stop_reason[row].masked_fill(stopped, STOP_STRING)
        self.finished[here] |= stopped
        return int(self.finished[here].sum())

    def forget(self, row: Tensor) -> None:
        """The responses of these prompts begin again."""
        self.ids[row] = self.pad_token_id
        for said in (self.logprobs, self.sampling_logprobs, self.values, self.lengths):
            said[row] = 0
        if self.history is not None:
            for index in row.tolist():
                self.history[index, len(self.prompts[index]) :] = self.prompts[index][0]

    def rollout(self) -> Rollout:
        """Copies: the next rollout is noted in the same place."""
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
        )
