"""Sampling responses with continuous batching: a finished sequence leaves at once, and the next prompt takes its slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_engine.config import RolloutConfig
from rlhf_engine.model import ActorCritic, Outputs
from rlhf_engine.model.pretrained import max_positions
from rlhf_engine.rollout.decode.cache import Allocate, new_memory
from rlhf_engine.rollout.decode.gpu import ladder
from rlhf_engine.rollout.decode.paged import PAGE_SIZE, PagedDecoder, is_paged, kv_bytes_of, pages_within
from rlhf_engine.rollout.decode.slots import MIN_ROWS, Act, Decoder, prompt_width, slot_bytes, slot_step
from rlhf_engine.rollout.rollout import Rollout
from rlhf_engine.rollout.state import ActiveSlots, RolloutState
from rlhf_engine.rollout.stopping import StopStrings
from rlhf_kernels import sample_tokens, token_logprobs

_CHECKED = 2
"""Slots of the decoder whose decoding is compared with forward passes before the first rollout."""


class Generator:
    """Samples from a policy, with log-probs and values on the way.

    A sequence depends on the weights, its prompt, `seed` and its number, and on nothing else: not on its slot, the
    batch or the order. `tokenizer` is read for `config.stop` alone. Keys and values take at
    most `kv_bytes`.

    Raises ValueError for a policy that it cannot decode (see `Decoder`), a stop string that no response can contain, or
    `kv_bytes` that do not hold one sequence.
    """

    def __init__(
        self,
        policy: ActorCritic,
        config: RolloutConfig,
        *,
        eos_token_ids: int | Sequence[int],
        pad_token_id: int,
        seed: int,
        stop_token_id: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        kv_bytes: int | None = None,
    ) -> None:
        self.policy, self.config, self.seed, self.pad_token_id = policy, config, seed, pad_token_id
        ends = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids)
        self.eos_token_ids = torch.tensor(ends, device=policy.device)
        self.stop_token_id = stop_token_id
        if config.stop and tokenizer is None:
            raise ValueError(f"tokenizer: got None, expected the one whose tokens spell rollout.stop {config.stop}")
        self.stops = StopStrings(tokenizer, config.stop, config.max_response_tokens) if config.stop else None
        self.columns = config.max_prompt_tokens + config.max_response_tokens
        self.slots = config.batch_size
        self.paged: PagedDecoder | None = None
        self._state: tuple[object, tuple[RolloutState, ActiveSlots, Act]] | None = None
        if is_paged(config.cache, policy.device.type):
            pages = None if kv_bytes is None else self._pages_within(kv_bytes)
            self.paged = PagedDecoder(policy, self.slots, self.columns, pages=pages, compiles=config.compile)
            self._refuse_compile()
            self.paged.check()
            return
        self._refuse_compile()
        if kv_bytes is not None:
            self.slots = min(self.slots, self._slots_within(kv_bytes))
        self._new_decoder(_CHECKED, new_memory).check()

    def _refuse_compile(self) -> None:
        if self.config.compile and (self.paged is None or not self.paged.compiles):
            raise ValueError(
                f"rollout.compile: got True for {type(self.policy.model).__name__} on {self.policy.device} with rollout.cache "
                f"{self.config.cache!r}, expected None or False: only a graph's step without compute_dtype is compiled"
            )

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values of all slots or pages."""
        if self.paged is not None:
            return self.paged.pool_bytes
        step = slot_step(self.policy)
        return -(-self.slots // step) * step * slot_bytes(self.policy, self.columns)

    def metrics(self) -> dict[str, float]:
        """Return what an update logs of the last rollout."""
        return {} if self.paged is None else {"restarted_sequences": self.paged.restarted}

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor | Sequence[int]],
        sequence: Tensor,  # (B,), int64, the number of each sequence in the run: its stream of random numbers
        on_finished: Callable[[int], object] | None = None,
        allocate: Allocate = new_memory,
    ) -> Rollout:
        """One response for each prompt. `on_finished` hears how many sequences ended since its last call.

        `allocate` gives the memory of keys and values, at most `cache_bytes`; nothing holds it after the call.
        """
        prompts = self._check(prompts, sequence)
        decoder = self._new_decoder(len(prompts), allocate)
        try:
            with self.policy.products():  # one copy of the weights for all steps
                return self._generate(decoder, prompts, sequence, on_finished)
        finally:
            decoder.close()

    def _generate(
        self,
        decoder: Decoder,
        prompts: list[Tensor],
        sequence: Tensor,
        on_finished: Callable[[int], object] | None,
    ) -> Rollout:
        record, running, act = self._state_for(decoder, len(prompts))
        record.begin(prompts, sequence)
        running.keep(0)
        # Popped from the end: long ones first, and those with the same ids together.
        waiting = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row].tolist()))
        slots = min(self.slots, len(prompts))
        while waiting or running.count:
            first, group = running.count, []
            if waiting and slots - first >= min(len(waiting), max(1, slots // 4)):
                group = self._next_group(waiting, prompts, slots - first)
                fits = decoder.room([prompts[row] for row in group], first)
                waiting += reversed(group[fits:])
                del group[fits:]
            if group:
                outputs = self._admit(decoder, running, prompts, group)
                act(outputs, slice(first, running.count))
            else:
                _make_room(decoder, record, running, waiting)
                first = 0
                decoder.step(running.token, running.position, running.count, act, running.idle)
            ended = record.count_ended(running, first)
            if ended:
                _release(decoder, running, record.finished[first : running.count], first)
                if on_finished is not None:
                    on_finished(ended)
        return record.rollout()

    def _state_for(self, decoder: Decoder, prompts: int) -> tuple[RolloutState, ActiveSlots, Act]:
        """Where sampling keeps its books; the last rollout's, where they have room for these prompts, for graphs' sake."""
        shape = (ladder(decoder.slots, MIN_ROWS), self.config)
        known, state = self._state or (None, None)
        if known != shape or state[0].most < prompts:
            record = RolloutState(
                prompts,
                shape[0],
                self.columns,
                self.config,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                stop_token_id=self.stop_token_id,
                stops=self.stops,
            )
            running = ActiveSlots.of(shape[0], prompts, self.policy.device)
            state = record, running, partial(self._act, record, running)
            self._state = shape, state
        return state

    def _admit(self, decoder: Decoder, running: ActiveSlots, prompts: list[Tensor], rows: list[int]) -> Outputs:
        first, new = running.count, slice(running.count, running.count + len(rows))
        outputs = decoder.prefill([prompts[row] for row in rows], first)
        running.row[new] = torch.tensor(rows, device=running.row.device)
        running.position[new] = torch.tensor([len(prompts[row]) - 1 for row in rows], device=running.row.device)
        running.step[new] = 0
        running.count += len(rows)
        return outputs

    def _act(
        self,
        record: RolloutState,
        running: ActiveSlots,
        outputs: Outputs,  # of rows >= N
        here: slice,
    ) -> None:
        """An action in each of N states, those of the slots `here`, noted."""
        config, backend, size = self.config, self.policy.backend, here.stop - here.start
        logits = outputs.logits[:size]
        sequence, position, *seen = record.streams(running, here)
        taken = sample_tokens(
            penalised(logits.float(), *seen, config.repetition_penalty) if seen else logits,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            seed=self.seed,
            sequence=sequence,
            position=position,
            backend=backend,
        )
        full = taken.logprobs
        if seen:
            full = token_logprobs(logits, taken.ids, temperature=config.temperature, backend=backend).logprobs
        values = torch.zeros_like(full) if outputs.values is None else outputs.values[:size]
        record.note(taken.ids, full, taken.sampling_logprobs, values, running, here)

    def _next_group(self, waiting: list[int], prompts: list[Tensor], room: int) -> list[int]:
        """Take up to `room` prompts of one prefill width, read within the token budget, off the end of `waiting`.

        `waiting` is sorted by length and ids. A prompt that is there several times is read once.
        """
        width, group, distinct = prompt_width(len(prompts[waiting[-1]])), [], 0
        while waiting and len(group) < room and prompt_width(len(prompts[waiting[-1]])) == width:
            distinct += not group or not torch.equal(prompts[group[-1]], prompts[waiting[-1]])
            if distinct > 1 and distinct * width > self.config.prefill_tokens:
                break
            group.append(waiting.pop())
        return group

    def _pages_within(self, kv_bytes: int) -> int:
        pages, least = pages_within(self.policy, kv_bytes), -(-self.columns // PAGE_SIZE)
        if pages < least:
            raise ValueError(self._too_small(kv_bytes, kv_bytes_of(self.policy, least), "one sequence"))
        return pages

    def _slots_within(self, kv_bytes: int) -> int:
        each, step = slot_bytes(self.policy, self.columns), slot_step(self.policy)
        if kv_bytes < each * step:
            what = "one sequence" if step == 1 else f"{step} sequences, the fewest that eager attention decodes,"
            raise ValueError(self._too_small(kv_bytes, each * step, what))
        return kv_bytes // (each * step) * step

    def _too_small(self, kv_bytes: int, least: int, what: str) -> str:
        return (
            f"kv_bytes: got {kv_bytes}, expected at least {least}, the keys and values of {what} of "
            f"max_prompt_tokens {self.config.max_prompt_tokens} and max_response_tokens {self.config.max_response_tokens}"
        )

    def _new_decoder(self, prompts: int, allocate: Allocate) -> Decoder:
        if self.paged is None:
            return Decoder(self.policy, min(self.slots, prompts), self.columns, allocate)
        self.paged.open(allocate, prompts)
        return self.paged

    def _check(self, prompts: Sequence[Tensor | Sequence[int]], sequence: Tensor) -> list[Tensor]:
        if len(prompts) == 0 or len(sequence) != len(prompts):
            raise ValueError(
                f"sequence: got {len(sequence)} numbers for {len(prompts)} prompts, expected one each, at least one"
            )
        tensors = [torch.as_tensor(prompt, dtype=torch.int64, device=self.policy.device) for prompt in prompts]
        for index, prompt in enumerate(tensors):
            if prompt.dim() != 1 or not 1 <= len(prompt) <= self.config.max_prompt_tokens:
                raise ValueError(
                    f"prompts[{index}]: got shape {tuple(prompt.shape)}, expected 1 to {self.config.max_prompt_tokens} ids "
                    "(rollout.max_prompt_tokens)"
                )
            longest, limit = len(prompt) + self.config.max_response_tokens, max_positions(self.policy.model)
            if limit is not None and longest > limit:
                raise ValueError(
                    f"prompts[{index}]: got {len(prompt)} ids beside rollout.max_response_tokens "
                    f"{self.config.max_response_tokens}, expected at most {limit} together, the policy's positions"
                )
        return tensors


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:  # (R, V), (R, S) ids -> (R, V)
    """Logits of ids that were seen are divided by `penalty` where above 0 and multiplied by it elsewhere.

    Source: Keskar et al. 2019 (CTRL), section 4.1, with the sign that transformers minds.
    """
    z = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(z > 0, z / penalty, z * penalty))


def _make_room(decoder: Decoder, record: RolloutState, running: ActiveSlots, waiting: list[int]) -> None:
    """Sequences that memory runs out for go back to `waiting`. They will say the same again: a number is a counter's."""
    left = decoder.make_room(running.count)
    if left:
        leaving = torch.zeros(running.count, dtype=torch.bool, device=running.row.device)
        leaving[left] = True
        record.forget(running.row[left])
        waiting += running.row[left].tolist()
        _release(decoder, running, leaving, 0)


def _release(decoder: Decoder, running: ActiveSlots, finished: Tensor, first: int) -> None:
    """Close the gaps that finished slots leave with the last live slots: each gap costs one slot's copy."""
    live = torch.ones(running.count, dtype=torch.bool, device=finished.device)
    live[first:] = ~finished
    count = int(live.sum())
    gaps, movers = (~live[:count]).nonzero()[:, 0], count + live[count:].nonzero()[:, 0]
    if len(gaps):
        decoder.move(movers, gaps, int(running.position[movers].max()))
        for vector in running.vectors():
            vector[gaps] = vector[movers]
    decoder.keep(count)
    running.keep(count)
