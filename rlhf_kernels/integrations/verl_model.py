"""A causal LM for verl's engine with `use_fused_kernels`: it outputs `log_probs` and `entropy` instead of logits.

B sequences, T positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ops import checks
from .head import fuse_head


class Output(NamedTuple):
    """The output that verl's engine reads."""

    log_probs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)


class FusedCausalLM(nn.Module):
    """A wrapper of a Hugging Face causal LM with a fused head.

    Apply FSDP to this wrapper, not to the model, so that the head runs inside the forward that gathers its weight.
    """

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
        """Return the log-prob of the token after each position and the entropy at it, as `forward_with_triton_backend`.

        The token after a position is the position's entry of `shift_labels`, or the next token of `input_ids` if
        `shift_labels` is None. For the last position that is the first token of the row, as in verl.

        Raises:
            ValueError: `return_dict` is False, or a temperature that does not fit.
        """
        if not return_dict:
            raise ValueError("return_dict: got False, expected True: verl's forward does not support False either")
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
