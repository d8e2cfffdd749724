"""Sampling of responses with continuous batching: the next prompt takes the slot of a finished sequence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_engine.config import RolloutConfig
from rlhf_engine.model import LanguageModel, Outputs
from rlhf_engine.model.pretrained import like, load_tokenizer, max_positions
from rlhf_engine.model.roles import POLICY
from rlhf_engine.rollout.decode import make_decoder
from rlhf_engine.rollout.decode.protocol import Act, Allocate, Decoder, new_memory, prompt_width
from rlhf_engine.rollout.rollout import Rollout
from rlhf_engine.rollout.state import ActiveSlots, RolloutState
from rlhf_engine.rollout.stopping import StopStrings, stop_tokens
from rlhf_kernels import sample_tokens, token_logprobs

_log = logging.getLogger(__name__)


class Generator:
    """Sampler of responses from a policy, with their log-probs and values.

    With `config.exact`, all later passes of the policy use the layers of decode steps (`LanguageModel.be_exact`).

    A sequence depends only on the weights, its prompt, `seed` and its number in the run. It does not depend on its slot, the
    batch or the order of sampling.

    Args:
        policy: the model.
        config: the settings of sampling.
        eos_token_ids: ids that end a response.
        pad_token_id: the id that pads prompts and responses on the right.
        seed: the seed of all random numbers.
        stop_token_id: the id of `config.stop_token`.
        tokenizer: the policy's tokenizer, by default the one in the folder that the policy was loaded from. Ids that are not
            in its vocabulary get probability 0 in the policy (`LanguageModel.restrict`), and are never sampled. `config.stop`
            needs it.
        kv_bytes: upper bound of the bytes of keys and values.
        decoder: replaces the decoder that `config.cache` and `kv_bytes` select.

    Raises:
        ValueError: for a policy that the decoder does not support, a stop string that no response can contain, or `kv_bytes`
            too small for one sequence.
    """

    def __init__(
        self,
        policy: LanguageModel,
        config: RolloutConfig,
        *,
        eos_token_ids: int | Sequence[int],
        pad_token_id: int,
        seed: int,
        stop_token_id: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        kv_bytes: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.policy, self.config, self.seed, self.pad_token_id = policy, config, seed, pad_token_id
        tokenizer = _tokenizer_of(policy) if tokenizer is None else tokenizer
        ends = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids)
        self.eos_token_ids = torch.tensor(ends, device=policy.device)
        self.stop_token_id = stop_token_id
        self.stops: StopStrings | None = None
        self.stop_ids: Tensor | None = None
        if config.stop:
            if tokenizer is None:
                raise ValueError(f"rollout.stop is set to {config.stop}, which needs a tokenizer; pass `tokenizer`")
            special = stop_tokens(tokenizer, config.stop)
            if special:
                self.stop_ids = torch.tensor([*special.values()], device=policy.device)
            if len(special) < len(config.stop):
                self.stops = StopStrings(tokenizer, config.stop, config.max_response_tokens, special)
        self.unknown_ids = 0 if tokenizer is None else policy.restrict(frozenset(tokenizer.get_vocab().values()))
        """Number of ids of the model that are no token of the tokenizer."""
        self.columns = config.max_prompt_tokens + config.max_response_tokens
        self.max_position = max_positions(policy.model)
        policy.limit_positions(self.columns)
        if config.exact:
            policy.be_exact()
        self.decoder = make_decoder(policy, config, self.columns, kv_bytes) if decoder is None else decoder
        self.decoder.check()
        if config.exact:
            from rlhf_engine.rollout.decode.exact import check_exact

            check_exact(self.decoder, policy, backend=policy.backend)
        self.merges = config.merge_adapters == "always"
        if self.merges and config.exact:
            raise ValueError(
                "rollout.merge_adapters: got 'always' with rollout.exact, expected 'never'; merging rounds"
            )
        if self.merges and policy.adapters is None:
            raise ValueError(
                "rollout.merge_adapters: got 'always' for a model without adapters, expected 'auto' or 'never'"
            )
        self._state: tuple[RolloutState, ActiveSlots, Act] | None = None

    @property
    def cache_bytes(self) -> int:
        """Upper bound of the bytes of keys and values."""
        return self.decoder.cache_bytes

    @property
    def phase_bytes(self) -> int:
        """Upper bound of the bytes that `generate` allocates: keys and values, and merged weights."""
        adapters = self.policy.adapters
        return self.cache_bytes + (adapters.merged_bytes(POLICY) if self.merges and adapters is not None else 0)

    def metrics(self) -> dict[str, float]:
        """Return the decoder's counts of the last rollout, and the number of ids that are not sampled."""
        return self.decoder.metrics() | ({"unknown_ids": self.unknown_ids} if self.unknown_ids else {})

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Tensor | Sequence[int]],
        sequence: Tensor,  # (B,), int64, the number of each sequence in the run, which selects its random numbers
        on_finished: Callable[[int], object] | None = None,
        allocate: Allocate = new_memory,
    ) -> Rollout:
        """Return one response per prompt. `on_finished` is called with the number of sequences that ended in a step.

        `allocate` provides the memory of keys, values and merged weights, at most `phase_bytes`. No reference to it is kept
        after the call.
        """
        prompts = self._check(prompts, sequence)
        with self._merged(allocate):
            try:
                self.decoder.open(len(prompts), allocate)
                with self.policy.products():  # round the weights once for all steps
                    return self._generate(prompts, sequence, on_finished)
            finally:
                self.decoder.close()

    def _merged(self, allocate: Allocate) -> AbstractContextManager[None]:
        adapters = self.policy.adapters
        return adapters.merged(POLICY, allocate) if self.merges and adapters is not None else nullcontext()

    def _generate(
        self, prompts: list[Tensor], sequence: Tensor, on_finished: Callable[[int], object] | None
    ) -> Rollout:
        decoder, (state, active, act) = self.decoder, self._state_for(len(prompts))
        state.begin(prompts, sequence)
        active.keep(0)
        # Prompts are popped from the end: long ones first, and equal ones together.
        waiting = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row].tolist()))
        slots = min(decoder.slots, len(prompts))
        while waiting or active.count:
            first, group = active.count, []
            if waiting and slots - first >= min(len(waiting), max(1, slots // 4)):
                group = self._next_group(waiting, prompts, slots - first)
                admitted = decoder.admissible([prompts[row] for row in group], first)
                waiting += reversed(group[admitted:])
                del group[admitted:]
            if group:
                outputs = self._admit(active, prompts, group)
                act(outputs, slice(first, active.count))
            else:
                self._preempt(state, active, waiting)
                first = 0
                decoder.step(active.token, active.position, active.count, act, active.idle)
            ended = state.count_ended(active, first)
            if ended:
                self._release(active, state.finished[first : active.count], first)
                if on_finished is not None:
                    on_finished(ended)
        return state.rollout()

    def _state_for(self, prompts: int) -> tuple[RolloutState, ActiveSlots, Act]:
        """Return the sampling state. Reuse the last one if its capacity suffices, because CUDA graphs hold its addresses."""
        kept = self._state
        if kept is None or kept[0].config != self.config or kept[0].capacity < prompts:
            state = RolloutState(
                prompts,
                self.decoder.rows,
                self.columns,
                self.config,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                stop_token_id=self.stop_token_id,
                stop_ids=self.stop_ids,
                stops=self.stops,
            )
            active = ActiveSlots.of(self.decoder.rows, prompts, self.policy.device)
            kept = self._state = state, active, partial(self._act, state, active)
        return kept

    def _next_group(self, waiting: list[int], prompts: list[Tensor], most: int) -> list[int]:
        """Pop up to `most` prompts of one prefill width from the end of `waiting`, within `config.prefill_tokens`.

        `waiting` is sorted by length and ids. Prompts with the same ids count once.
        """
        width, group, distinct = prompt_width(len(prompts[waiting[-1]])), [], 0
        while waiting and len(group) < most and prompt_width(len(prompts[waiting[-1]])) == width:
            distinct += not group or not torch.equal(prompts[group[-1]], prompts[waiting[-1]])
            if distinct > 1 and distinct * width > self.config.prefill_tokens:
                break
            group.append(waiting.pop())
        return group

    def _admit(self, active: ActiveSlots, prompts: list[Tensor], rows: list[int]) -> Outputs:
        """Prefill the prompts of these rows into the next slots; return the outputs in the state after each prompt."""
        first, new = active.count, slice(active.count, active.count + len(rows))
        outputs = self.decoder.prefill([prompts[row] for row in rows], first)
        active.row[new] = torch.tensor(rows, device=active.row.device)
        active.position[new] = torch.tensor([len(prompts[row]) - 1 for row in rows], device=active.row.device)
        active.step[new] = 0
        active.count += len(rows)
        return outputs

    def _act(
        self,
        state: RolloutState,
        active: ActiveSlots,
        outputs: Outputs,  # of rows >= N
        slots: slice,
    ) -> None:
        """Sample one action for each of the N slots in `slots` and append it."""
        config, backend, size = self.config, self.policy.backend, slots.stop - slots.start
        assert outputs.logits is not None
        logits = outputs.logits[:size]
        sequence, position, *seen = state.sampling_inputs(active, slots)
        taken = sample_tokens(
            penalised(logits.float(), seen[0], config.repetition_penalty) if seen else logits,
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
        if seen or config.exact:  # the sampler's formula rounds differently from that of the loss
            full = token_logprobs(logits, taken.ids, temperature=config.temperature, backend=backend).logprobs
        values = torch.zeros_like(full) if outputs.values is None else outputs.values[:size]
        state.append(taken.ids, full, taken.sampling_logprobs, values, active, slots)

    def _preempt(self, state: RolloutState, active: ActiveSlots, waiting: list[int]) -> None:
        """Preempt sequences when the KV cache is full.

        They are regenerated later with the same tokens, because sampling is counter-based.
        """
        slots = self.decoder.preempt(active.count)
        if slots:
            preempted = torch.zeros(active.count, dtype=torch.bool, device=active.row.device)
            preempted[slots] = True
            state.restart(active.row[slots])
            waiting += active.row[slots].tolist()
            self._release(active, preempted, 0)

    def _release(self, active: ActiveSlots, finished: Tensor, first: int) -> None:
        """Free the slots from `first` on where `finished` is True, and move the last active sequences into the gaps."""
        live = torch.ones(active.count, dtype=torch.bool, device=finished.device)
        live[first:] = ~finished
        count = int(live.sum())
        gaps, movers = (~live[:count]).nonzero()[:, 0], count + live[count:].nonzero()[:, 0]
        if len(gaps):
            self.decoder.move(movers, gaps, int(active.position[movers].max()))
            for vector in active.vectors():
                vector[gaps] = vector[movers]
        self.decoder.keep(count)
        active.keep(count)

    def _check(self, prompts: Sequence[Tensor | Sequence[int]], sequence: Tensor) -> list[Tensor]:
        """Return the prompts as tensors on the policy's device, or raise ValueError."""
        if len(prompts) == 0 or len(sequence) != len(prompts):
            raise ValueError(
                f"sequence: got {len(sequence)} numbers for {len(prompts)} prompts, expected one number per prompt and at "
                "least one prompt"
            )
        config, limit = self.config, self.max_position
        tensors = [torch.as_tensor(prompt, dtype=torch.int64, device=self.policy.device) for prompt in prompts]
        for index, prompt in enumerate(tensors):
            if prompt.dim() != 1 or not 1 <= len(prompt) <= config.max_prompt_tokens:
                raise ValueError(
                    f"prompts[{index}]: got shape {tuple(prompt.shape)}, expected 1 to {config.max_prompt_tokens} ids "
                    "(rollout.max_prompt_tokens)"
                )
            if limit is not None and len(prompt) + config.max_response_tokens > limit:
                raise ValueError(
                    f"prompts[{index}]: got {len(prompt)} ids and rollout.max_response_tokens {config.max_response_tokens}, "
                    f"expected a sum of at most {limit}, the number of positions of the policy"
                )
        return tensors


def _tokenizer_of(policy: LanguageModel) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in the folder that a policy was loaded from; None, with a log line, if there is none."""
    source = policy.model.name_or_path
    if source and (Path(source) / "tokenizer_config.json").is_file():
        return load_tokenizer(source, trust_remote_code=like(policy.model)["trust_remote_code"])
    if policy.head.excluded is None:
        _log.warning(
            "Generator: no `tokenizer` is given and %s has none, so ids that are no token may be sampled",
            source or "a model that was built in memory",
        )
    return None


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:  # (R, V), (R, S) ids -> (R, V)
    """Return logits in which those of `seen` ids are divided by `penalty` if positive and multiplied by it otherwise.

    Source: Keskar et al. 2019 (CTRL), section 4.1, with the sign handling of transformers.
    """
    z = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(z > 0, z / penalty, z * penalty))
