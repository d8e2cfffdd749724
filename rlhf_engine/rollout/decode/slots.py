"""The trunk as a decoder: prompts in, then one token a sequence and step, through a `SlotCache`.

A row's hidden state has the same bits whatever the rows around it, which is what makes a sample independent of its batch.
Four things see to that on CPU: a matrix product has at least `MIN_ROWS` rows (fewer take another path in BLAS), a prompt
is padded to a width that its own length decides, attention reads the columns of its own sequence alone (eager attention: a
width that the configuration decides), and activations are replaced where torch's kernels round by position
(`InvariantLayers`).

Whatever decodes for a `Generator` has what `Decoder` has: `slots`, `prefill`, `decode`, `logits`, `step`, `move` and `check`;
and `room`, `make_room`, `keep` and `close`, which say something where memory is not one slot a sequence (`PagedDecoder`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from rlhf_engine.model import ActorCritic, Outputs, TokenBatch
from rlhf_engine.model.pretrained import max_positions
from rlhf_engine.model.roles import Want
from rlhf_engine.rollout.decode.cache import Allocate, SlotCache, kv_bytes, kv_shape, new_memory, same_as
from rlhf_engine.rollout.decode.cpu import REPLACED, InvariantLayers, head_product

MIN_ROWS = 16
Act = Callable[[Outputs, slice], None]
"""What is done in the states of a step, given the policy's outputs and the slots: work on tensors only, for graphs."""
_BLOCK = 512
"""Columns that attention takes at a time on CPU; a longer cache is read in whole blocks."""


def prompt_width(length: int) -> int:
    """Columns of the prefill of a prompt: a function of its own length, with at most a quarter of padding beyond 64."""
    step = MIN_ROWS
    while step * 4 < length:
        step *= 2
    return -(-length // step) * step


def slot_columns(tokens: int) -> int:
    """Return the columns of a slot for sequences of at most `tokens` tokens."""
    return -(-tokens // MIN_ROWS) * MIN_ROWS


def slot_bytes(policy: ActorCritic, columns: int) -> int:
    """Bytes of the keys and values of one sequence of at most `columns` tokens."""
    return kv_bytes(kv_shape(policy), slot_columns(columns), policy.product_dtype)


def slots_per_step(*, eager: bool) -> int:
    """Return the number of which slots come in multiples: eager attention needs keys for every row of a step."""
    return MIN_ROWS if eager else 1


def slot_step(policy: ActorCritic) -> int:
    """Return `slots_per_step` of the policy's attention."""
    return slots_per_step(eager=policy.model.config.get_text_config()._attn_implementation == "eager")


def sampled_outputs(policy: ActorCritic) -> tuple[Want, ...]:
    """Return what a decode step asks the policy for: values too, where they come from the same hidden states."""
    return ("logits", "values") if policy.value is not None and policy.value.shares_trunk else ("logits",)


def prefill_batch(policy: ActorCritic, prompts: list[Tensor], source: list[int], cache: Cache) -> TokenBatch:
    """Return prompts of one `prompt_width` as one pass reads them; row r is the state after prompt `source[r]`.

    There are at least `MIN_ROWS` rows; those beyond `source` repeat the first prompt's. Columns beyond a prompt's end repeat
    its last token: no real token sees them, and no key or value of theirs is used. Positions stay within the model's.
    """
    device, width, limit = policy.device, prompt_width(len(prompts[0])), max_positions(policy.model)
    inputs = torch.stack([torch.cat([p, p[-1:].expand(width - len(p))]) for p in prompts])
    last = torch.tensor([row * width + len(prompt) - 1 for row, prompt in enumerate(prompts)], device=device)
    rows = last[torch.tensor(source + [0] * (MIN_ROWS - len(source)), device=device)]
    positions = None
    if limit is not None and width > limit:
        positions = torch.arange(width, device=device).clamp(max=limit - 1).expand_as(inputs)
    return TokenBatch(input_ids=inputs, rows=rows, position_ids=positions, cache=cache)


class Decoder:
    """Runs a policy's trunk on a cache with `slots` sequences of at most `columns` tokens.

    Made anew for new weights. `allocate` gives the memory of keys and values.

    Raises ValueError for a model whose attention is not plain or sliding-window, or whose decoding with the cache does not
    give what one forward pass over the whole sequence gives (`check`).
    """

    def __init__(self, policy: ActorCritic, slots: int, columns: int, allocate: Allocate = new_memory) -> None:
        self.policy = policy
        self.columns = slot_columns(columns)
        self.text_config = policy.model.config.get_text_config()
        self.attention = _attention_of(policy)
        self.eager = self.text_config._attn_implementation == "eager"
        self.slots = slots + -slots % slot_step(policy)
        self.cache = SlotCache(self.text_config.num_hidden_layers, self.slots, self.columns, allocate)
        self.layers = InvariantLayers(policy)
        self.want = sampled_outputs(policy)
        self.project = head_product(policy)
        self.column = torch.arange(self.columns, device=policy.device)

    def prefill(self, prompts: list[Tensor], first: int) -> Outputs:  # rows >= MIN_ROWS
        """Read prompts of one `prompt_width` into slots `first`, ...; return the outputs in the state after each prompt.

        Prompts with the same ids are read once. Rows beyond the prompts repeat the first one.
        """
        firsts, source = same_as(prompts)
        batch = prefill_batch(self.policy, [prompts[index] for index in firsts], source, self.cache)
        self.cache.prefill(first, torch.tensor(source, device=self.policy.device))
        with self.layers.prefill():
            return self.policy(batch, self.want, project=self.project)

    def decode(
        self,
        tokens: Tensor,  # (slots,), the last token of each sequence; slots at `count` and beyond hold none
        positions: Tensor,  # (slots,), its position
        count: int,
        want: Collection[Want] | None = None,
    ) -> Outputs:  # rows >= MIN_ROWS
        """Feed one token to each of the first `count` slots; return the outputs in the states after them."""
        spare = max(0, MIN_ROWS - count)
        tokens, positions = (pad(x[:count], (0, spare)) for x in (tokens, positions))
        width = self.columns
        if width > _BLOCK:
            longest = int(positions[:count].max()) + 1
            width = min(width, -(-longest // _BLOCK) * _BLOCK)
        self.cache.decode(positions if self.eager else positions[:count], width)
        mask = self._mask(positions, width)
        with self.layers.decode():
            batch = TokenBatch(
                input_ids=tokens[:, None], attention_mask=mask, position_ids=positions[:, None], cache=self.cache
            )
            return self.policy(batch, want or self.want, project=self.project)

    def step(
        self,
        tokens: Tensor,  # (slots,)
        positions: Tensor,  # (slots,)
        count: int,
        act: Act,
        idle: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Call `act(outputs, here)` in the states after `decode`, of the rows `here`: those of the first `count` slots.

        A graph may hold it, and then `here` has rows behind those, without a sequence. In `idle` it has no sequence at all.
        """
        act(self.decode(tokens, positions, count), slice(0, count))

    def move(self, source: Tensor, target: Tensor, width: int) -> None:
        """Sequences of at most `width` tokens in slots `source` go on in slots `target`; the two must not overlap."""
        self.cache.move(source, target, width)

    def room(self, prompts: list[Tensor], count: int) -> int:
        """How many of these prompts, in their order, there is memory for beside `count` running sequences: a slot each."""
        return len(prompts)

    def make_room(self, count: int) -> list[int]:
        """The slots whose sequences had to leave, so that all others of the first `count` can take one more token: none."""
        return []

    def room_of(self, length: int) -> int:
        """How many sequences of `length` tokens there is memory for at a time."""
        return self.slots

    def keep(self, count: int) -> None:
        """The sequences in slots at `count` and beyond are gone."""

    def close(self) -> None:
        """Sampling is over."""

    def _mask(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        column, position = self.column[:width], positions[:, None, None, None]
        masks = {"full_attention": column <= position}
        if "sliding_attention" in self.attention:
            masks["sliding_attention"] = masks["full_attention"] & (column > position - self.text_config.sliding_window)
        if self.eager:
            lowest = torch.finfo(self.policy.lm_weight.dtype).min
            zero = torch.zeros((), dtype=self.policy.lm_weight.dtype, device=positions.device)
            masks = {kind: torch.where(mask, zero, lowest) for kind, mask in masks.items()}
        return masks if len(self.attention) > 1 else masks[self.attention[0]]

    @torch.no_grad()
    def check(self) -> None:
        """Compare two sequences of different lengths (one slot: one), decoded, with one forward pass over each."""
        ids = torch.arange(1, 11, device=self.policy.device).remainder(self.policy.lm_weight.shape[0])
        if self.columns < len(ids):
            return
        sequences, read = (ids, ids.flip(0)[:7])[: self.room_of(len(ids))], 2
        self.prefill([sequence[:-read] for sequence in sequences], 0)
        for ahead in range(read, 0, -1):
            at = torch.tensor([len(sequence) - ahead for sequence in sequences], device=ids.device)
            tokens = torch.stack([sequence[-ahead] for sequence in sequences])
            decoded = self.decode(tokens, at, len(sequences), ("hidden",)).hidden
        for row, sequence in enumerate(sequences):
            expected = self.policy(TokenBatch(input_ids=sequence[None]), ("hidden",)).hidden[-1]
            # Scores near a softcap c round to c eps, and the softmax makes that a relative error, in every layer.
            rounding = 64 + 4 * (getattr(self.text_config, "attn_logit_softcapping", None) or 0)
            allowed = rounding * torch.finfo(expected.dtype).eps * float(expected.abs().max())
            difference = float((decoded[row].float() - expected.float()).abs().max())
            if not difference <= allowed:
                raise ValueError(
                    f"policy: {type(self.policy.model).__name__} decoded token by token differs from its own forward pass by "
                    f"{difference:.3g} (at most {allowed:.3g} expected); its attention does not read a plain 4D mask"
                )


def _attention_of(policy: ActorCritic) -> list[str]:
    """The kinds of attention layers that need a mask each; ValueError for kinds that the cache cannot hold."""
    model, text = policy.model, policy.model.config.get_text_config()
    if text._attn_implementation not in (*REPLACED, "eager"):
        raise ValueError(
            f"policy: got attention {text._attn_implementation!r}, expected {', '.join(map(repr, REPLACED))} or 'eager'"
        )
    default = "sliding_attention" if getattr(text, "sliding_window", None) is not None else "full_attention"
    kinds = sorted(set(getattr(text, "layer_types", None) or [default]))
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if getattr(model, "_is_stateful", False):
        unknown.append("a recurrent state")
    if getattr(text, "alibi", False) or hasattr(policy.trunk, "build_alibi_tensor"):
        unknown.append("ALiBi biases made from the padding mask")
    if unknown:
        got = ", ".join(unknown)
        raise ValueError(f"policy: {type(model).__name__} has {got}, expected full or sliding-window attention")
    return kinds
