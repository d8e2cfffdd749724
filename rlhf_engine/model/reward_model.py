"""The reward model: a causal LM without its unembedding, and one linear layer to a scalar.

Shapes: B sequences, S tokens, H hidden.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from rlhf_engine.files import read_json, require, write_json
from rlhf_engine.model.heads import ValueHead
from rlhf_engine.model.layout import TokenBatch
from rlhf_engine.model.pretrained import load_head, load_pretrained
from rlhf_engine.model.trunk import check_packing, checkpoint_layers, last_hidden, output_layer, packs, trunk_of
from rlhf_engine.model.upcast import upcast_products

VALUE_MODEL = "value_model"
"""Folder of a value function with its own trunk, in the policy's folder."""

_HEAD_FILE, _INFO_FILE = "reward_head.safetensors", "reward_model.json"


class RewardModel(nn.Module):
    """`r(x, y) = w . h(x, y) + b`, where h is the hidden state of the last token of prompt x followed by response y."""

    def __init__(self, trunk: PreTrainedModel, head: ValueHead) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.compute_dtype: torch.dtype | None = None
        self.eval()

    @classmethod
    def from_causal_lm(cls, model: PreTrainedModel, seed: int) -> Self:
        """Return a reward model with a copy of the trunk of `model` and a new head drawn from N(0, 1 / (H + 1))."""
        trunk = copy.deepcopy(trunk_of(model))
        hidden_size = output_layer(model).weight.shape[1]
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(hidden_size, generator=generator) * (hidden_size + 1) ** -0.5
        return cls(trunk, ValueHead.from_weights(weight.to(next(trunk.parameters()).device)))

    def computing(self, *, compute_dtype: torch.dtype | None = None, gradient_checkpointing: bool = False) -> Self:
        """Set how the trunk computes, and return the model.

        Args:
            compute_dtype: dtype of the matrix products; None is that of the weights.
            gradient_checkpointing: recompute the trunk's layers in the backward pass.
        """
        self.compute_dtype = None if compute_dtype == self.trunk.dtype else compute_dtype
        upcast_products(self.trunk, self.compute_dtype or self.trunk.dtype)
        if gradient_checkpointing:
            checkpoint_layers(self.trunk)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the head. The trunk stays in evaluation mode (no dropout), which does not stop gradients."""
        super().train(mode)
        self.trunk.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.weight.device

    def forward(
        self,
        ids: Tensor,  # (B, S), padded on the right
        lengths: Tensor,  # (B,), tokens of each row
    ) -> Tensor:  # (B,) float32
        """Return one score per row, read at its last token. In a causal trunk it depends on the whole row and on no pad."""
        hidden = self._hidden(ids)
        return self.head(hidden[torch.arange(len(ids), device=ids.device), lengths - 1])

    # ---- as a value function with its own trunk ----

    shares_trunk = False
    saved_as = f"{VALUE_MODEL}/config.json"

    @property
    def packs(self) -> bool:
        """Whether micro-batches with a token budget are packed without padding."""
        return packs(self.trunk, self.compute_dtype)

    def batch_values(self, batch: TokenBatch, hidden: Tensor | None = None) -> Tensor:  # (N,) float32
        """Return the head's output at the states of a batch: as in InstructGPT, the value starts as the reward."""
        states = self._hidden(batch.input_ids, batch.cu_inputs).flatten(0, 1)
        assert batch.rows is not None
        return self.head(states.index_select(0, batch.rows))

    def loss_inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the values of a batch's states, with a gradient."""
        return {"values": self.batch_values(batch)}

    def save_value(self, folder: Path) -> None:
        """Write the model into the folder of a policy."""
        (folder / VALUE_MODEL).mkdir()
        self.save(folder / VALUE_MODEL)

    def check_packing(self) -> None:
        """Raise ValueError if packed sequences affect each other in the trunk."""
        check_packing(self.trunk, self.compute_dtype)

    def score_rows(
        self,
        ids: Tensor,  # (B, S), padded on the right
        lengths: Tensor,  # (B,)
        chunk: int = 32,
    ) -> Tensor:  # (B,) float32
        """Return the score of every row, computed for `chunk` rows of similar length at a time to reduce padding."""
        order = lengths.argsort()
        scores = [self(ids[part, : int(lengths[part].max())], lengths[part]) for part in order.split(chunk)]
        return torch.cat(scores)[order.argsort()]

    def _hidden(self, ids: Tensor, cu_inputs: Tensor | None = None) -> Tensor:
        return last_hidden(self.trunk, ids, compute_dtype=self.compute_dtype, cu_inputs=cu_inputs, use_cache=False)

    @torch.no_grad()
    def centre(self, mean: float) -> None:
        """Subtract `mean` from all scores, so that scores with that mean get mean 0."""
        self.head.bias.sub_(mean)

    def save(self, folder: str | Path) -> None:
        """Write the trunk in transformers' format, and the head next to it (safetensors and JSON)."""
        folder = Path(folder)
        self.trunk.save_pretrained(folder)
        save_file({name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}, folder / _HEAD_FILE)
        info = {"kind": "reward_model", "hidden_size": self.head.weight.numel()}
        write_json(folder / _INFO_FILE, info)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        attention: str | None = "sdpa",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Read what `save` wrote.

        Raises:
            ValueError: a file or a weight is missing or broken. The message names it.
        """
        folder = Path(folder)
        require(folder, "config.json", _INFO_FILE, _HEAD_FILE)
        trunk = load_pretrained(AutoModel, folder, attention=attention, dtype=dtype, device=device)
        hidden_size = read_json(folder / _INFO_FILE).get("hidden_size")
        return cls(trunk, load_head(folder / _HEAD_FILE, hidden_size).to(device))
