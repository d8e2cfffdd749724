"""Embeddings whose rows are added to the gradients in the arena."""

import pytest
import torch
from torch import nn

from rlhf_engine.compat.trl_lookups import rows_added
from rlhf_engine.memory import Arena, gradient_bytes, gradients_in


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_add_their_rows_to_the_sum(tied):
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleList([nn.Embedding(7, 3, padding_idx=2), nn.Linear(3, 7, bias=False)])
    if tied:
        model[1].weight = model[0].weight
    ids, wanted = torch.tensor([[1, 4, 2], [4, 4, 6]]), torch.randn(2, 3, 7, generator=generator)

    def backward():
        (model[1](model[0](ids)).tanh() * wanted).sum().backward()

    parameters = list(model.parameters())
    for _ in range(2):
        backward()
    expected = [parameter.grad.clone() for parameter in parameters]
    model.zero_grad(set_to_none=True)
    arena = Arena({"train": gradient_bytes(parameters)}, poison=True)
    with arena.phase("train"), gradients_in(arena, parameters) as places, rows_added(model, places):
        for _ in range(2):  # the second sum starts anew
            model.zero_grad(set_to_none=True)
            for _ in range(2):
                backward()
            for parameter, sums in zip(parameters, expected, strict=True):
                torch.testing.assert_close(parameter.grad, sums)
        (gradient,) = torch.autograd.grad(model[1](model[0](ids)).sum(), [parameters[0]], allow_unused=True)
        assert tied or gradient is None  # autograd computes none
    assert "forward" not in vars(model[0]) and model[0].weight.grad is None
