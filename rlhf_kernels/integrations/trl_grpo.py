# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# torch does not declare the types of `Tensor.split`.
"""TRL's GRPOTrainer and RLOOTrainer with log-probs and entropies from hidden states; the rest of a trainer is unchanged.

B sequences, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..modules import FusedHead
from .conventions import counted, refuse, release
from .head import fuse_head, token_logprobs_of

KNOWN = {"1.12": "logits", "1.16": "fused_lm_head"}
"""Supported releases of TRL, and what its `_get_per_token_logps_and_entropies` computes log-probs from."""


class GRPOMixin:
    """A mixin for GRPOTrainer and RLOOTrainer that avoids [B, T, V] logits, on any device.

        class Trainer(GRPOMixin, GRPOTrainer): ...

    It replaces only the method that returns log-probs and entropies. All features of TRL that use them still work:
    token and sequence ratios, clip-higher, `delta`, importance weights and every loss type. Heads with a softcap or a
    logit scale, with LoRA, in `modules_to_save` or with `trainable_token_indices` are supported, and so is
    `cast_lm_head_to_fp32`. Images, MoE balancing losses and,
    in TRL 1.12, `use_liger_kernel` are not, and raise ValueError.
    """

    # Attributes of the trainer.
    args: Any
    accelerator: Any
    model: Any
    temperature: float

    def __init__(self, *args: Any, **kwargs: Any):
        release("trl", None, KNOWN)
        super().__init__(*args, **kwargs)
        if getattr(self, "use_liger_kernel", False):  # TRL 1.16 has no such attribute and no loss of Liger's
            raise ValueError(
                "args.use_liger_kernel: got True, with which the loss of TRL 1.12 does not call this mixin; set it to False"
            )
        self._fuse(self.model)  # before FSDP wraps it, in train()

    def _fuse(self, model: nn.Module) -> FusedHead:
        float32 = getattr(self.args, "cast_lm_head_to_fp32", False)  # RLOOConfig does not have it
        return fuse_head(self.accelerator.unwrap_model(model), float32=float32)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Return log-probs and entropies (B, logits_to_keep) of the response's tokens, 0 where `attention_mask` is 0."""
        refuse("TRL", compute_aux_loss=compute_aux_loss, **images)
        head = self._fuse(model)
        mask = counted("attention_mask", attention_mask, input_ids)
        parts = []
        for rows, where in zip(
            input_ids.split(batch_size or len(input_ids)), mask.split(batch_size or len(mask)), strict=True
        ):
            with self.accelerator.autocast():
                taken = token_logprobs_of(
                    model,
                    rows,
                    where.to(attention_mask.dtype),
                    logits_to_keep,
                    head=head,
                    temperature=self.temperature,
                    mask=where[:, -logits_to_keep:],
                )
            parts.append(taken)
        logprobs, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs, entropies if compute_entropy else None, None
