"""The heads on hidden states: the value function, and the output layer with the vocabulary of a tokenizer.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_engine.model.layout import TokenBatch
from rlhf_kernels import FusedHead

VALUE_HEAD = "value_head.safetensors"
"""File of a policy's value head, in the policy's folder."""


_EXCLUDED = -1e9
"""Logit of an excluded id. Its probability is exactly 0 in float32, and it is finite, as the kernels require."""


class OutputHead(FusedHead):
    """The fused output layer, optionally restricted to the ids that a tokenizer has.

    Models pad their vocabulary beyond the tokenizer's, and such an id decodes to no text. An excluded id has probability 0 in
    sampling, log-probs, entropy and loss alike, so that the ratio of a policy to itself is 1, and its row gets no gradient.
    """

    excluded: Tensor | None = None  # (ids,), int64, on the CPU
    _on_device: dict[Any, Tensor]

    def restrict(self, known: Collection[int]) -> int:
        """Exclude the ids that are not in `known`, and return their number.

        A softcap bounds every logit, so that only the ids after the last known one can be excluded under it.
        """
        rows, known = self._rows(), frozenset(known)
        last = max(known, default=rows - 1)
        found = [token for token in range(rows) if token not in known and (self.softcap is None or token > last)]
        if self.excluded is None or self.excluded.tolist() != found:
            self.excluded, self._on_device = torch.tensor(found) if found else None, {}
        return len(found)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Exclude no id inside the `with` block."""
        kept, self.excluded = self.excluded, None
        try:
            yield
        finally:
            self.excluded = kept

    def matrices(self, hidden: Tensor) -> Any:  # (..., H)
        """Return `FusedHead.matrices`, whose product gives excluded ids a logit of minus infinity, or leaves them out."""
        found = super().matrices(hidden)
        if self.excluded is None:
            return found
        if self.softcap is not None:
            rows = self._rows() - len(self.excluded)
            return found._replace(weight=found.weight[:rows], bias=None if found.bias is None else found.bias[:rows])
        bias = self._bias(found.weight)
        return found._replace(bias=bias if found.bias is None else found.bias + bias)

    def logits(self, hidden: Tensor) -> Tensor:  # (..., H) -> (..., V)
        """Return the logits; those of excluded ids are finite and so low that their probability is 0."""
        return self.masked(super().logits(hidden))

    def masked(self, logits: Tensor) -> Tensor:  # (..., V) -> (..., V)
        """Return the logits with those of excluded ids replaced; in place if no gradient is needed."""
        if self.excluded is None or logits.shape[-1] < self._rows():
            return logits
        ids = self._cached(("ids", logits.device), lambda excluded: excluded.to(logits.device))
        fill = logits.index_fill if logits.requires_grad else logits.index_fill_
        return fill(-1, ids, _EXCLUDED)

    def _rows(self) -> int:
        layer: Any = self if self.layer is None else getattr(self.layer, "base_layer", self.layer)
        return layer.weight.shape[0]

    def _bias(self, weight: Tensor) -> Tensor:  # (V,)
        def make(excluded: Tensor) -> Tensor:
            bias = torch.zeros(self._rows(), dtype=weight.dtype, device=weight.device)
            return bias.index_fill_(0, excluded.to(weight.device), _EXCLUDED)

        return self._cached(("bias", weight.device, weight.dtype), make)

    def _cached(self, key: object, make: Any) -> Tensor:
        # A CUDA graph reads these tensors, so they are created once.
        if key not in self._on_device:
            self._on_device[key] = make(self.excluded)
        return self._on_device[key]


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
