"""OpenRLHF's Actor from hidden states: a `forward` with the same signature, without [B, T, V] logits.

B sequences, T positions, K actions.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import FusedHead
from .conventions import counted, refuse
from .head import fuse_head, token_logprobs_of


class ActorMixin:
    """A mixin that replaces the `forward` of OpenRLHF's Actor.

        class Actor(ActorMixin, openrlhf.models.Actor): ...

    Call `fuse()` before DeepSpeed wraps the model. Packed samples, ring attention, images and returned logits are not
    supported and raise ValueError.
    """

    # Attributes of the actor.
    model: nn.Module
    temperature: float
    _fused_head: FusedHead

    def fuse(self) -> ActorMixin:
        """Replace the model's output layer by a fused head (see `fuse_head`) and return the actor."""
        refuse(
            "OpenRLHF", packing_samples=getattr(self, "packing_samples", False), is_vlm=getattr(self, "is_vlm", False)
        )
        self._fused_head = fuse_head(self.model)
        return self

    def forward(
        self,
        sequences: Tensor,  # (B, T)
        action_mask: Tensor | None = None,  # (B, K)
        attention_mask: Tensor | None = None,  # (B, T)
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Tensor | tuple[Tensor, SimpleNamespace]:
        """Return the log-probs of the actions (B, K), or of all tokens (B, T - 1) if there is no action mask.

        Without an action mask, `return_logprobs=True` is required. Log-probs are 0 where the action mask is 0.
        `return_output` adds an object whose `entropy` is (B, T - 1), or None without `return_entropy`. With an action
        mask, the entropy is 0 outside the actions.

        Raises:
            ValueError: the head is not fused, or an argument is not supported.
        """
        if not hasattr(self, "_fused_head"):
            raise ValueError("the actor's head is not fused; call Actor(...).fuse() before DeepSpeed wraps the model")
        unmade = {
            "allgather_logits": allgather_logits,
            "ring_attn_group": ring_attn_group,
            "packed_seq_lens": packed_seq_lens,
        }
        refuse("OpenRLHF", **unmade, **mm_inputs)
        if action_mask is None and not return_logprobs:
            raise ValueError(
                "action_mask is not set; pass it, or return_logprobs=True: a fused head does not return logits"
            )
        if return_entropy and not return_output:
            raise ValueError("return_output: got False with return_entropy=True, expected True")
        keep, mask = sequences.shape[1] - 1, None
        if action_mask is not None:
            keep = action_mask.shape[1]
            mask = counted("action_mask", action_mask, sequences[:, -keep:])
        attended = counted("attention_mask", attention_mask, sequences)
        position = attended.long().cumsum(-1) - 1
        taken = token_logprobs_of(
            self.model,
            sequences,
            attended.long() if attention_mask is None else attention_mask,
            keep,
            head=self._fused_head,
            temperature=self.temperature,
            mask=mask,
            position_ids=position.masked_fill(~attended, 1),
        )
        if not return_output:
            return taken.logprobs
        before = sequences.shape[1] - 1 - keep
        entropy = None
        if return_entropy:
            assert taken.entropy is not None
            entropy = torch.nn.functional.pad(taken.entropy, (before, 0))
        return taken.logprobs, SimpleNamespace(entropy=entropy)
