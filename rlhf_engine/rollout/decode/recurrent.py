"""Decoding of models whose layers keep a recurrent state per sequence: Mamba, linear attention, short convolutions.

A prompt is prefilled with transformers' cache of the model, whose layers are then copied into slots. In a decode step the model
updates the states of the slots in place. The next sequence in a slot replaces its states.

A recurrent state contains every token that the layer has read, so a prefill has no padding: only prompts of one length share a
pass. On a CPU every prompt has a separate pass, because the kernels of a scan round by the number of sequences.
"""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rlhf_engine.model import LanguageModel, Outputs, TokenBatch
from rlhf_engine.rollout.decode.cpu import InvariantFunctions, InvariantLayers, head_product
from rlhf_engine.rollout.decode.protocol import (
    MIN_ROWS,
    Allocate,
    check_attention,
    check_decoding,
    check_kv_bytes,
    column_masks,
    new_memory,
    same_as,
    sampled_outputs,
)
from rlhf_engine.rollout.decode.slots import WholeSequenceSlots, slot_columns
from rlhf_engine.rollout.decode.states import CacheShape, RecurrentCache, check_cache, new_cache

_WINDOWED, _RECURRENT = ("sliding_attention", "hybrid_sliding"), ("linear_attention", "conv")
_KINDS = ("full_attention", "hybrid", "moe", "mlp", *_WINDOWED, *_RECURRENT)
"""Kinds of layers as configs name them."""


def recurrent_kinds(policy: LanguageModel) -> set[str]:
    """Return the kinds of layers of a policy with recurrent states.

    Raises:
        ValueError: for an attention implementation or a kind of layer that is not supported.
    """
    text = policy.model.config.get_text_config()
    check_attention(text._attn_implementation)
    kinds = set(text.layer_types)
    if unknown := kinds - set(_KINDS):
        raise ValueError(
            f"policy: {type(policy.model).__name__} has layers of kind {', '.join(sorted(unknown))} next to recurrent ones, "
            f"expected some of {', '.join(_KINDS)}"
        )
    return kinds


class RecurrentDecoder(WholeSequenceSlots[RecurrentCache]):
    """`Decoder` with `slots` slots for sequences of up to `columns` tokens, or fewer slots to fit into `kv_bytes`.

    Raises:
        ValueError: for a kind of layer or an attention that is not supported, a recurrent state outside of transformers' cache,
            and for `kv_bytes` that are too few.
    """

    def __init__(self, policy: LanguageModel, slots: int, columns: int, kv_bytes: int | None = None) -> None:
        self.policy, self.columns = policy, slot_columns(columns)
        self.text_config = policy.model.config.get_text_config()
        self.kinds = recurrent_kinds(policy)
        self.eager = self.text_config._attn_implementation == "eager"
        self.want = sampled_outputs(policy)
        self.layers = InvariantLayers(policy)
        self.shape = self._probe()
        if kv_bytes is not None:
            check_kv_bytes(
                kv_bytes, self._bytes(1), f"one sequence of {columns} tokens and the states of {MIN_ROWS} rows"
            )
            slots = bisect_right(range(1, slots + 1), kv_bytes, key=self._bytes)
        self.slots = self.rows = slots
        self.project = None
        self.cache = None
        self.new_slots: Callable[[Cache], RecurrentCache] | None = None

    @torch.no_grad()
    def _probe(self) -> CacheShape:
        """Return the shapes in the model's cache after one token."""
        cache = new_cache(self.policy.model)
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.policy.device)
        try:
            with cache_argument(self.policy.trunk):
                self.policy(TokenBatch(input_ids=token, cache=cache), ("hidden",))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"policy: {type(self.policy.model).__name__} does not accept transformers' cache, so it cannot be sampled; it "
                "can be scored and fine-tuned"
            ) from error
        check_cache(self.policy.model, cache)
        return CacheShape.of(cache)

    def _bytes(self, slots: int) -> int:
        return self.shape.slot_bytes(slots, self.columns, eager=self.eager)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys, values and recurrent states in all slots."""
        return self._bytes(self.slots)

    def check(self) -> None:
        """Raise ValueError if decoding differs from one forward pass over the whole sequence."""
        check_decoding(self, self.policy, self.slots)

    def open(self, sequences: int, allocate: Allocate = new_memory) -> None:
        """Begin a rollout with at most `sequences` slots, which the first prefill allocates."""
        slots = min(self.slots, sequences)
        rows = max(slots, MIN_ROWS)
        self.new_slots = partial(
            RecurrentCache, slots=rows if self.eager else slots, rows=rows, columns=self.columns, allocate=allocate
        )
        self.project = head_product(self.policy)  # with the current weights

    def close(self) -> None:
        """Drop the slots and the reordered weight."""
        self.cache = self.project = self.new_slots = None

    def prefill(self, prompts: list[Tensor], first: int) -> Outputs:  # rows >= MIN_ROWS
        """Prefill prompts into slots `first`, ...; return the outputs in the state after each prompt."""
        firsts, source = same_as(prompts)
        passes = _passes([len(prompts[index]) for index in firsts], together=self.policy.device.type != "cpu")
        outputs, place = [], {}
        with InvariantFunctions(), self.layers.prefill(), cache_argument(self.policy.trunk):
            for group in passes:
                place |= {one: len(place) + row for row, one in enumerate(group)}
                slots = [first + slot for slot, one in enumerate(source) if one in group]
                copied = [group.index(one) for one in source if one in group]
                outputs.append(self._prefill_pass(torch.stack([prompts[firsts[one]] for one in group]), copied, slots))
        rows = [place[one] for one in source]
        return _rows_of(outputs, rows + rows[:1] * (MIN_ROWS - len(rows)))

    def _prefill_pass(self, ids: Tensor, copied: list[int], slots: list[int]) -> dict[str, Tensor]:  # ids: (B, S)
        """Prefill prompts of one length and copy rows `copied` of the cache to `slots`; return the outputs of B rows."""
        assert self.new_slots is not None
        device, (count, length), cache = ids.device, ids.shape, new_cache(self.policy.model)
        last = torch.arange(1, count + 1, device=device) * length - 1
        rows = torch.cat([last, last[:1].expand(max(0, MIN_ROWS - count))])
        found = self.policy(TokenBatch(input_ids=ids, rows=rows, cache=cache), self.want, project=self.project)
        if self.cache is None:
            self.cache = self.new_slots(cache)
        source, target = (torch.tensor(x, device=device) for x in (copied, slots))
        self.cache.store(cache, source, target, length)
        return {name: getattr(found, name)[:count] for name in self.want}

    @contextmanager
    def decoding(self, positions: Tensor, width: int, rows: int) -> Iterator[None]:
        """Set up the slots and the layers for one decode step."""
        assert self.cache is not None
        self.cache.decode(positions, width, rows)
        with (
            InvariantFunctions(),
            self.layers.decode(eager=self.eager),
            cache_argument(self.policy.trunk),
            limited_time_steps(self.policy.trunk),
        ):
            yield

    def mask(self, positions: Tensor, width: int) -> Tensor | Mapping[str, Tensor | None] | None:
        """Return the masks of the columns that each sequence has, by kind of layer if there are several."""
        if not self.shape.keys:
            return None
        windowed = not self.kinds.isdisjoint(_WINDOWED)
        kinds = ["full_attention", "sliding_attention"] if windowed else ["full_attention"]
        masks = column_masks(
            self.text_config, kinds, positions, width, self.policy.lm_weight.dtype if self.eager else None
        )
        if isinstance(masks, Tensor):
            return masks
        full, window = (masks[kind] for kind in kinds)
        return {
            "full_attention": full,
            "hybrid": full,
            **dict.fromkeys(_WINDOWED, window),
            **dict.fromkeys(_RECURRENT),
        }


def _passes(lengths: Sequence[int], *, together: bool) -> list[list[int]]:
    """Return groups of prompts, by index, that share a prefill: those of one length if `together`, otherwise single prompts."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length if together else index, []).append(index)
    return list(groups.values())


def _rows_of(outputs: list[dict[str, Tensor]], rows: list[int]) -> Outputs:
    """Return the given rows of the outputs of several passes."""
    found: dict[str, Any] = {name: torch.cat([one[name] for one in outputs])[rows] for name in outputs[0]}
    return Outputs(**found)


@contextmanager
def limited_time_steps(trunk: nn.Module) -> Iterator[None]:
    """Apply the limits of Mamba 2's time steps in decode steps inside the context, as a pass over a whole sequence does.

    transformers' update of a single token ignores them (Nemotron-H, Zamba 2). The time steps are softplus(x + bias), where
    x are the last outputs of `in_proj`. Therefore x is limited here.
    """
    with ExitStack() as stack:
        mixer: Any
        for mixer in trunk.modules():
            low, high = getattr(mixer, "time_step_limit", None) or (0.0, math.inf)
            if low > 0 or high < math.inf:
                hook = partial(_limit_time_steps, mixer, *(_softplus_inverse(x) for x in (low, high)))
                stack.callback(mixer.in_proj.register_forward_hook(hook).remove)
        yield


def _softplus_inverse(x: float) -> float:
    return math.log(math.expm1(x)) if 0 < x < 30 else (x if x else -math.inf)


def _limit_time_steps(mixer: Any, low: float, high: float, module: nn.Module, args: Any, out: Tensor) -> Tensor:
    bias = mixer.dt_bias.to(out.dtype)
    rest, steps = out.split([out.shape[-1] - len(bias), len(bias)], -1)
    return torch.cat([rest, torch.minimum(torch.maximum(steps, low - bias), high - bias)], -1)


# ---- the trunk's forward pass ----


@contextmanager
def cache_argument(trunk: PreTrainedModel) -> Iterator[None]:
    """Pass `past_key_values` under the name `cache_params` to trunks that call it so (Mamba)."""
    names = inspect.signature(trunk.forward).parameters

    def rename(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {("cache_params" if name == "past_key_values" else name): x for name, x in kwargs.items()}

    if "past_key_values" in names or "cache_params" not in names:
        yield
        return
    handle = trunk.register_forward_pre_hook(rename, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
