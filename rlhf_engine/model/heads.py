"""The value function as a head on hidden states. Shapes: N tokens, H hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_engine.model.layout import TokenBatch

VALUE_HEAD = "value_head.safetensors"
"""File of a policy's value head, in the policy's folder."""


class ValueHead(nn.Module):
    """A linear layer from a hidden state to one scalar, with weights and arithmetic in float32.

    `V(s) = w . h + b`. It starts at zero, so that every state first has value 0, or as a copy of a reward model's head
    (InstructGPT, appendix C.4).
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
        """Return a head with the weights of a scalar head, such as the reward model's; `bias` is a scalar.

        Raises:
            ValueError: `weight` has more than one row.
        """
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
    saved_as = VALUE_HEAD
    packs = True

    def batch_values(self, batch: TokenBatch, hidden: Tensor | None) -> Tensor:  # (N,)
        """Return the value of each state, computed from the policy's hidden states (N, H)."""
        assert hidden is not None
        return self(hidden)

    def loss_inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the head's weights, from which the fused loss computes values while it reads the hidden states."""
        return {"value_weight": self.weight, "value_bias": self.bias}

    def save_value(self, folder: Path) -> None:
        """Write the head into the folder of a policy."""
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}, folder / VALUE_HEAD
        )

    def check_packing(self) -> None:
        """Do nothing: the head reads one state at a time."""

    def forward(self, hidden: Tensor) -> Tensor:  # (..., H) -> (...)
        """Return the value of each hidden state."""
        # A product and a sum, not a matrix product: the bits of a row's value must not depend on the other rows.
        return (hidden.float() * self.weight).sum(-1) + self.bias
