"""Mixtures of experts: the bits of a sampled sequence depend on nothing else, and where they do, the log states it."""

import logging

import pytest
import torch
from torch import nn

from benchmarks.families.checks import depends_on_batch, generator_of
from benchmarks.families.configs import build
from rlhf_engine.model import ActorCritic
from rlhf_engine.rollout.decode.cpu import InvariantFunctions, InvariantLayers, invariant_experts

# A gate with sigmoid; transposed weights with biases; sigmoid in the router, one per group.
MIXTURES = ("qwen2_moe", "gpt_oss", "glm4_moe")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_sequence_has_the_bits_of_batches_of_1_4_and_64(family, dtype):
    assert depends_on_batch(family, dtype, count=64, response=4) == 0


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama"])
def test_the_experts_are_those_of_transformers(family):
    policy, plain = ActorCritic(build(family)), build(family)
    ids = torch.arange(3, 33)[None]
    layers = InvariantLayers(policy)
    with torch.no_grad(), layers.prefill():
        assert (policy.model.config._experts_implementation == "rlhf_experts") == (family != "llama")
        found = policy.model(ids).logits
    assert policy.model.config._experts_implementation != "rlhf_experts"
    torch.testing.assert_close(found, plain(ids).logits, rtol=0, atol=1e-5)


def test_a_token_does_not_depend_on_the_tokens_of_its_expert():
    experts = build("mixtral").model.layers[0].mlp.experts
    hidden, weights = torch.randn(40, 32), torch.full((40, 2), 0.5)
    chosen = torch.stack([torch.arange(40) % 4, (torch.arange(40) + 1) % 4], 1)
    with torch.no_grad():
        together = invariant_experts(experts, hidden, chosen, weights)
        for row in (0, 17, 39):
            rows = slice(row, row + 1)
            alone = invariant_experts(experts, hidden[rows], chosen[rows], weights[rows])
            assert torch.equal(alone[0], together[row])


def gelu_tanh(x):
    return nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    "function", [torch.sigmoid, torch.Tensor.sigmoid, nn.functional.silu, nn.functional.gelu, gelu_tanh]
)
def test_activations_do_not_depend_on_their_place(function):
    x = torch.randn(1003)
    with InvariantFunctions():
        together, alone = function(x), torch.cat([function(x[k : k + 1]) for k in range(len(x))])
    assert torch.equal(together, alone)
    torch.testing.assert_close(together, function(x), rtol=1e-5, atol=1e-6)


def test_experts_outside_the_interface_are_logged(caplog):
    with caplog.at_level(logging.WARNING):
        for family in ("mixtral", "llama", "llama4_text"):
            InvariantLayers(ActorCritic(build(family)))
        assert not caplog.text
        for family in ("jetmoe", "dbrx"):
            generator_of(ActorCritic(build(family)))
    for name in ("JetMoeForCausalLM", "DbrxForCausalLM"):
        assert f"{name}: the experts of" in caplog.text and "may depend on rollout.batch_size" in caplog.text
