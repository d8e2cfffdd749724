"""A causal LM as verl's engine reads it with `use_fused_kernels`: `output.log_probs` and `output.entropy`, no logits.

B sequences, T positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ops import checks
from .head import fuse_head


class Output(NamedTuple):
    """What verl's engine reads."""

    log_probs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)


class FusedCausalLM(nn.Module):
    """Wraps a Hugging Face causal LM; wrap this, not the model, with FSDP: the head then runs in its forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: nn.Module = model
        self.config: Any = model.config
        fuse_head(model)

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        position_ids: Tensor | None = None,  # (B, T)
        temperature: float = 1.0,
        shift_labels: Tensor | None = None,  # (B, T)
        return_dict: bool = True,
        **inputs: Any,
    ) -> Output:
        """Return the log-prob of the token after each position, and the entropy there, as `forward_with_triton_backend`.

        The token after a position is that of `shift_labels`, or the next of `input_ids`; after the last one, as in verl, the
        first.
        """
        if not return_dict:
            raise ValueError("return_dict: got False, expected True, as verl's own")
        checks.number("temperature", temperature, above=0)
        labels = input_ids.roll(-1, -1) if shift_labels is None else shift_labels
        head = fuse_head(self.model)
        with head.taking(labels, temperature=temperature, shifted=True) as taken:
            output = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **inputs
            )
        logprobs, entropy = taken.result(output.logits)
        assert entropy is not None
        return Output(logprobs, entropy)
