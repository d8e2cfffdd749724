"""The heads on hidden states: the value function, and the output layer with the vocabulary of a tokenizer.

Shapes: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.trunk import check_finite, output_layer
from rlhf_kernels import FusedHead

if TYPE_CHECKING:
    from rlhf_engine.model.actor_critic import LanguageModel

VALUE_HEAD = "value_head.safetensors"
"""File of a policy's value head, in the policy's folder."""


_PROBE_LOGIT = 60.0
"""Largest logit of `check_head`. It is so large that a softcap shows for any initialisation."""

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

    def matrices(self, hidden: Tensor, mask: Tensor | None = None) -> Any:  # (..., H), (...)
        """Return `FusedHead.matrices`, whose product gives excluded ids a logit of minus infinity, or leaves them out."""
        found = super().matrices(hidden, mask)
        if self.excluded is None:
            return found
        if self.softcap is not None:
            return found.first(self._rows() - len(self.excluded))
        bias = self._bias(found.hidden)
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

    def _bias(self, hidden: Tensor) -> Tensor:  # (V,)
        def make(excluded: Tensor) -> Tensor:
            bias = torch.zeros(self._rows(), dtype=hidden.dtype, device=hidden.device)
            return bias.index_fill_(0, excluded.to(hidden.device), _EXCLUDED)

        return self._cached(("bias", hidden.device, hidden.dtype), make)

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


# ---- check of the output layer ----


@torch.no_grad()
def check_head(policy: LanguageModel) -> None:
    """Raise ValueError if the log-probs differ from the model's; logits are scaled up so that any transform shows."""
    vocabulary = policy.lm_weight.shape[0]
    ids = torch.arange(1, 9, device=policy.device).remainder(vocabulary)[None]
    hidden = policy._states(TokenBatch(input_ids=ids))[None]
    product = policy.head.matrices(hidden).product().float()
    check_finite(policy.model, product)
    gain = _PROBE_LOGIT / max(float(policy.head.transform(product).abs().max()), 1e-6)

    def blow_up(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * gain

    handle = output_layer(policy.model).register_forward_hook(blow_up)
    try:
        theirs = policy.model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    ours = policy.head.transform(product * gain)
    difference = float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())
    # The model rounds its product, the scaled product and the transformed logits to the weights' dtype.
    allowed = _PROBE_LOGIT * (8 * torch.finfo(policy.lm_weight.dtype).eps + 1e-6)
    if not difference <= allowed:
        raise ValueError(
            f"model: the log-probs of {type(policy.model).__name__} differ from those computed from its hidden states by "
            f"{difference:.3g} (allowed: {allowed:.3g}), so it is not supported; {_explain(ours, theirs)}"
        )


def _explain(ours: Tensor, theirs: Tensor) -> str:
    """Return a description of the transform from our logits to the model's, for an error message."""
    ratio, largest = (theirs * ours).sum() / ours.square().sum(), float(theirs.abs().max())
    if torch.allclose(theirs, ratio * ours, rtol=1e-2, atol=1e-2 * largest):
        return f"the model multiplies its logits by {float(ratio):.4g}, a logit scale that its config does not declare"
    # Only words of an error: the largest logit is a little below the softcap, so the comparison is rough.
    squeezed = largest * torch.tanh(ours / largest)
    if math.isfinite(largest) and torch.allclose(theirs, squeezed, atol=0.1 * largest):
        return f"the model limits its logits to {largest:.4g}, a softcap that its config does not declare"
    return (
        "the difference is neither a scale nor a softcap; the head may have more than one matrix, or the trunk may lack its "
        "final norm"
    )
