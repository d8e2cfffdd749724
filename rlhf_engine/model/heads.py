"""What turns hidden states into a value or into logits.

Shapes: B sequences, T positions, N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rlhf_engine.model.layout import TokenBatch

VALUE_HEAD = "value_head.safetensors"
"""File of a policy's value head, in the policy's folder."""


class ValueHead(nn.Module):
    """A linear layer from a hidden state to one scalar, with weights and arithmetic in float32.

    `V(s) = w . h + b`. It starts at zero, so that the first value of every state is 0, unless a reward model's head is
    given (InstructGPT, appendix C.4).
    """

    def __init__(self, hidden_size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=torch.float32, device=device))  # (H,)
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float32, device=device))

    @classmethod
    def from_weights(
        cls,
        weight: Tensor,  # (H,) or (1, H)
        bias: Tensor | float = 0.0,
    ) -> Self:
        """A head that starts as a copy of another scalar head, such as the reward model's; its bias is a scalar."""
        if weight.numel() != weight.shape[-1]:
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)}, expected the weight of one scalar, [H] or [1, H]"
            )
        head = cls(weight.shape[-1], weight.device)
        with torch.no_grad():
            head.weight.copy_(weight.reshape(-1))
            head.bias.copy_(torch.as_tensor(bias).reshape(()))
        return head

    shares_trunk = True
    packs = True

    def batch_values(self, batch: TokenBatch, hidden: Tensor) -> Tensor:  # (N,)
        """Return the value of each state, read from the policy's hidden states (N, H)."""
        return self(hidden)

    def loss_inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the head's weights, with which the fused loss computes values from its own read of the hidden states."""
        return {"value_weight": self.weight, "value_bias": self.bias}

    def save_value(self, folder: Path) -> None:
        """Write the head into the folder of a policy."""
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}, folder / VALUE_HEAD
        )

    def check_packing(self) -> None:
        """Do nothing: it looks at one state at a time."""

    def forward(self, hidden: Tensor) -> Tensor:  # (..., H) -> (...)
        # A product and a sum instead of a matrix product: a row's value has the same bits whatever the rows around it.
        return (hidden.float() * self.weight).sum(-1) + self.bias


@dataclass(frozen=True)
class HeadTransform:
    """How a model turns `u = h W^T + b` into logits: `softcap * tanh(logit_scale * u / softcap)`."""

    logit_scale: float = 1.0
    """Factor of the product."""
    softcap: float | None = None
    """Bound of the logits' magnitude; None leaves them alone."""

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> Self:
        """Read the transform from the attributes by which the Hugging Face families call it.

        `final_logit_softcapping` (Gemma) caps, `logit_scale` (Cohere) and `lm_head_multiplier` (Falcon-H1) multiply,
        `logits_scaling` (Granite) divides.
        """
        text = config.get_text_config()
        scale = 1.0
        for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
            factor = getattr(text, name, None)
            if factor is not None:
                scale *= float(factor) ** power
        softcap = getattr(text, "final_logit_softcapping", None)
        return cls(scale, None if softcap is None else float(softcap))

    def __call__(self, product: Tensor) -> Tensor:  # (..., V) -> (..., V)
        if self.logit_scale != 1.0:
            product = product * self.logit_scale
        return product if self.softcap is None else self.softcap * torch.tanh(product / self.softcap)

    def explain(self, product: Tensor, logits: Tensor) -> str:
        """The transform that would turn `product` into the model's own `logits`, in words, for an error message."""
        ours = self(product)
        ratio = (logits * ours).sum() / ours.square().sum()
        if torch.allclose(logits, ratio * ours, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            return f"the model's logits are {float(ratio):.4g} times ours: a logit scale that its config does not show"
        if float(logits.abs().max()) < 0.9 * float(ours.abs().max()) and math.isfinite(float(logits.abs().max())):
            return f"the model's logits stay within {float(logits.abs().max()):.4g}: a softcap that its config does not show"
        return "it is neither a scale nor a softcap: a head of more than one matrix, or a trunk without its final norm"
