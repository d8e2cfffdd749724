"""The matrix products of a PPO update alone, in float32: what all else in bench_ppo_step's update comes on top of.

No attention, norm, activation, softmax or optimiser: the trunk's and the head's products of sampling (prompts, then a token a
step), of scoring by reference and reward model, and of every epoch's passes, with the rows that our trainer cuts them into.
Every row counts in the backward passes, as it does while no ratio is clipped. A layer's matrices are of the layer, so that they
come from as far as in a model.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from benchmarks.harness import Session
from rlhf_kernels.ops.head import Plan


class Products:
    """The matrices of a Llama with as many key heads as heads, and its products for some rows."""

    def __init__(self, model: dict) -> None:
        if model["num_key_value_heads"] != model["num_attention_heads"]:
            raise ValueError(f"num_key_value_heads: got {model['num_key_value_heads']}, expected num_attention_heads")
        hidden, inner = model["hidden_size"], model["intermediate_size"]
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        self.layers = [torch.randn(shape) for _ in range(model["num_hidden_layers"]) for shape in shapes]
        self.head = torch.randn(model["vocab_size"], hidden)
        # As many rows as the fused head makes at a time.
        self.head_rows = Plan.of(1, len(self.head), torch.float32, "cpu", None, None).step
        self.inputs = cache(torch.randn)  # one a shape

    def trunk(self, rows: int, *, learn: bool = False) -> None:
        """Every layer once, with `learn` the products into its input and its weight too."""
        for weight in self.layers:
            self._layer(weight, rows, learn)

    def logits(self, rows: int, *, learn: bool = False) -> None:
        for start in range(0, rows, self.head_rows):
            self._layer(self.head, min(self.head_rows, rows - start), learn)

    def _layer(self, weight: Tensor, rows: int, learn: bool) -> None:
        x = self.inputs(rows, weight.shape[1])
        out = x @ weight.t()
        if learn:
            out @ weight
            out.t() @ x


def update(products: Products, batch: dict) -> None:
    """One update, prompt to optimiser."""
    prompts, response = batch["prompts"], batch["response_tokens"]
    length = batch["prompt_tokens"] + response
    products.trunk(prompts * batch["prompt_tokens"])
    products.logits(prompts)
    for _ in range(response - 1):
        products.trunk(prompts)
        products.logits(prompts)
    sequences = max(1, batch["tokens"] // (length - 1))
    cuts = [min(sequences, prompts - start) for start in range(0, prompts, sequences)]
    for rows in cuts:
        products.trunk(rows * (length - 1))  # the reference
        products.logits(rows * response)
        products.trunk(rows * length)  # the reward model
    for _ in range(batch["epochs"]):
        for rows in cuts:
            products.trunk(rows * (length - 1), learn=True)
            products.logits(rows * response, learn=True)


@torch.no_grad()
def worker(session: Session, *, model: dict, batch: dict) -> None:
    """An update's products a step of the session."""
    session.baseline()
    products = Products(model)
    session.ready()
    while session.begin():
        update(products, batch)
        session.end()
