"""Only the matrix products of a PPO update in float32: a lower bound of the update in `bench_ppo_step`.

Attention, norms, activations, softmax and optimizer are omitted. Included are the products of trunk and head in sampling
(the prompts, then one token per step), in scoring by reference and reward model, and in the passes of every epoch, with the
rows per pass of our trainer. Every row has a gradient in the backward passes, as it does while no ratio is clipped. Every
layer has separate matrices, so they are read from the same level of the memory hierarchy as in a model.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from benchmarks.harness import Session
from rlhf_kernels.ops.head import Plan


class Products:
    """The matrices of a Llama with as many key heads as attention heads, and its products for a number of rows."""

    def __init__(self, model: dict) -> None:
        if model["num_key_value_heads"] != model["num_attention_heads"]:
            raise ValueError(
                f"num_key_value_heads: got {model['num_key_value_heads']}, expected the number of attention heads, "
                f"{model['num_attention_heads']}"
            )
        hidden, inner = model["hidden_size"], model["intermediate_size"]
        shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
        self.layers = [torch.randn(shape) for _ in range(model["num_hidden_layers"]) for shape in shapes]
        self.head = torch.randn(model["vocab_size"], hidden)
        # The number of rows that the fused head computes at a time.
        self.head_rows = Plan.of(1, len(self.head), torch.float32, "cpu", None, None).step
        self.inputs = cache(torch.randn)  # one tensor per shape

    def trunk(self, rows: int, *, learn: bool = False) -> None:
        """Compute every layer once; with `learn`, also the products for the gradients of its input and its weight."""
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
    """Compute the products of one update."""
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
    """Compute the products of one update per step of the session."""
    session.baseline()
    products = Products(model)
    session.ready()
    while session.begin():
        update(products, batch)
        session.end()
