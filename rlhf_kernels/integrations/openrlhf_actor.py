"""OpenRLHF's Actor from hidden states: its `forward` under its own signature, without [B, T, V] logits.

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
    """`class Actor(ActorMixin, openrlhf.models.Actor)`; call `fuse()` before DeepSpeed wraps the model.

    Packed samples, rings of devices, images and logits as a result are refused.
    """

    # Attributes of the actor.
    model: nn.Module
    temperature: float
    _fused_head: FusedHead

    def fuse(self) -> ActorMixin:
        """Puts the head in its place (see `fuse_head`)."""
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
        """Log-probs of the actions (B, K), 0 where the mask is, or with `return_logprobs` of all tokens, (B, T - 1).

        `return_output` adds an object with `entropy` (B, T - 1), which with an action mask is that of the actions alone.
        """
        if not hasattr(self, "_fused_head"):
            raise ValueError("model: got an Actor that was not fused, expected Actor(...).fuse() before it is wrapped")
        unmade = {
            "allgather_logits": allgather_logits,
            "ring_attn_group": ring_attn_group,
            "packed_seq_lens": packed_seq_lens,
        }
        refuse("OpenRLHF", **unmade, **mm_inputs)
        if action_mask is None and not return_logprobs:
            raise ValueError("action_mask: got None, expected a mask or return_logprobs=True: the head makes no logits")
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
