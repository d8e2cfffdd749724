"""Decode steps with compiled layers: the same tokens, one graph for all layers of a kind, and unchanged layers afterwards."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from rlhf_engine.config import RolloutConfig
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.roles import VALUE
from rlhf_engine.model.trunk import layers_of
from rlhf_engine.rollout.decode import make_decoder
from rlhf_engine.rollout.decode.gpu import CompiledLayers
from tests.engine.helpers.adapted_models import adapted, moved
from tests.engine.helpers.paged_sampling import check_same, make_generator
from tests.engine.helpers.sampling import make_actor, make_prompts


def compiling(generator, backend):
    """Run the generator's decode steps, which are not CUDA graphs here, with compiled layers."""
    decoder = generator.decoder
    compiled, forward = CompiledLayers(generator.policy, decoder.cache, backend), decoder._forward
    decoder.compiles = True

    def through_compiled(*arguments):
        with compiled():
            return forward(*arguments)

    decoder._forward = through_compiled
    return compiled


@pytest.mark.parametrize(
    ("family", "graphs"), [("llama", 1), ("qwen2", 1), ("gpt2", 1), ("mistral", 1), ("gemma2", 2), ("cohere", 1)]
)
def test_one_graph_for_all_layers(family, graphs):
    """Gemma 2 has two graphs, because it has layers with and without a window."""
    torch._dynamo.reset()
    actor, prompts, counter = make_actor(family), make_prompts(16), CompileCounter()
    expected = make_generator(actor).generate(prompts, torch.arange(16))
    generator = make_generator(actor)
    compiling(generator, counter)
    check_same(generator.generate(prompts, torch.arange(16)), expected)
    assert counter.frame_count == graphs
    generator.generate(prompts[:9], torch.arange(9))  # the same number of rows, with a smaller pool of pages
    assert counter.frame_count == graphs
    assert not any("forward" in layer.__dict__ for layer in layers_of(actor.trunk))


def test_an_error_restores_the_layers():
    actor = make_actor()
    compiled = compiling(make_generator(actor), "eager")
    before = torch._dynamo.config.recompile_limit
    with pytest.raises(KeyError), compiled():
        assert all("forward" in layer.__dict__ for layer in layers_of(actor.trunk))
        raise KeyError
    assert not any("forward" in layer.__dict__ for layer in layers_of(actor.trunk))
    assert torch._dynamo.config.recompile_limit == before


def test_hitting_the_recompile_limit_raises(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("rlhf_engine.rollout.decode.gpu.LIMIT", 1)
    actor = make_actor("gemma2")
    generator = make_generator(actor)
    compiling(generator, "eager")
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        generator.generate(make_prompts(16), torch.arange(16))


def test_a_trunk_with_unmarked_layers_is_refused():
    actor = make_actor()
    generator = make_generator(actor)
    generator.decoder.cache.layers.append(generator.decoder.cache.layers[0])
    with pytest.raises(ValueError, match=r"rollout\.compile: got LlamaForCausalLM with 2 layers .*expected 3"):
        CompiledLayers(actor, generator.decoder.cache)


def test_layers_with_a_replaced_forward_are_refused():
    actor = make_actor()
    generator = make_generator(actor)
    layer = next(layers_of(actor.trunk))
    layer.forward = layer.forward
    with pytest.raises(ValueError, match="layers whose forward was replaced"):
        CompiledLayers(actor, generator.decoder.cache)


@pytest.mark.parametrize("cache", ["slots", "paged"])
def test_compiling_without_cuda_graphs_is_refused(cache):
    with pytest.raises(ValueError, match=r"rollout\.compile: got True for LlamaForCausalLM on cpu"):
        make_decoder(make_actor(), RolloutConfig(cache=cache, compile=True), 32)


def test_layers_with_adapters_are_one_graph_that_follows_the_adapter():
    """The compiled function reads the adapter that is active and its current weights."""
    torch._dynamo.reset()
    model, adapters = adapted(change=False)
    adapters.add(VALUE, 3, trained=True)
    actor, prompts, counter = ActorCritic(model), make_prompts(16), CompileCounter()
    generator = make_generator(actor)
    compiling(generator, counter)
    found = [generator.generate(prompts, torch.arange(16))]
    moved(adapters, scale=0.5)
    found.append(generator.generate(prompts, torch.arange(16)))
    assert counter.frame_count == 1
    check_same(found[1], make_generator(actor).generate(prompts, torch.arange(16)))
    assert not torch.equal(found[0].logprobs[:, 0], found[1].logprobs[:, 0])
