"""Gradient checkpointing: the same gradient with fewer saved activations."""

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, Zamba2Config, Zamba2ForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_engine.config import RewardConfig, load_config
from rlhf_engine.data import Example
from rlhf_engine.model import ActorCritic, frozen_copy
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.trunk import checkpoint_layers
from rlhf_engine.recipes.loading import computing
from rlhf_engine.recipes.ppo import make_policy as make_ppo_policy
from rlhf_engine.supervised.reward_model import RankedPrompt, fit_reward_model
from tests.engine.helpers.passes import hidden_of
from tests.engine.helpers.rollouts import gradients, make_rollout
from tests.engine.helpers.tiny_models import VOCABULARY, tiny


def make_policy(family, value_model=None, **settings) -> ActorCritic:
    """Return a policy whose config has dropout. A layer that ran in training mode would apply it."""
    changes = {"resid_pdrop": 0.5, "attn_pdrop": 0.5} if family.startswith("gpt2") else {"attention_dropout": 0.5}
    return ActorCritic(tiny(family, initializer_range=0.2, **changes), value_model, **settings)


def inputs_of(rollout) -> torch.Tensor:
    return torch.cat([rollout.prompt_ids, rollout.response_ids], 1)


def saved_bytes(policy: ActorCritic, rollout) -> int:
    """Return the bytes that the trunk saves for its backward pass; each storage counts once, weights do not count."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = hidden_of(policy, inputs_of(rollout))
    assert hidden.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "gpt2_tied", "gemma2", "mistral"])
def test_the_gradient_is_bitwise_the_same(family):
    rollout = make_rollout()
    expected = gradients(make_policy(family), rollout, microbatch=4)
    found = gradients(make_policy(family, gradient_checkpointing=True), rollout, microbatch=4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_the_gradient_is_bitwise_the_same_when_packed_and_with_bfloat16_products():
    """The backward pass restores the attention and dtype of the forward pass, whose contexts are closed by then."""
    rollout = make_rollout()
    for compute in (None, torch.bfloat16):
        both = []
        for again in (False, True):
            policy = make_policy("mistral", compute_dtype=compute, gradient_checkpointing=again)
            policy.packs = True
            both.append(gradients(policy, rollout, microbatch_tokens=30))
        assert all(torch.equal(both[1][name], gradient) for name, gradient in both[0].items())


def test_a_layer_that_applies_dropout_itself_stays_in_evaluation_mode():
    """OPT's layers read their own training flag, and transformers checkpoints layers only in training mode."""
    sizes = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = OPTForCausalLM(OPTConfig(vocab_size=61, max_position_embeddings=64, dropout=0.5, **sizes))
    ids = torch.tensor([[4, 5, 6, 7]])
    expected = hidden_of(ActorCritic(model), ids)
    assert torch.equal(hidden_of(ActorCritic(model, gradient_checkpointing=True), ids), expected)


def test_a_gradient_of_a_gradient_is_the_same():
    """TRPO differentiates the trunk twice."""
    results = []
    for again in (False, True):
        policy = make_policy("llama", gradient_checkpointing=again)
        policy.model.set_attn_implementation("eager")
        weights = list(policy.trunk.parameters())
        loss = hidden_of(policy, torch.tensor([[4, 5, 6]])).square().sum()
        slopes = torch.autograd.grad(loss, weights, create_graph=True)
        results.append(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), weights))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_fewer_activations_are_saved():
    rollout = make_rollout()
    plain, again = (saved_bytes(make_policy("llama", gradient_checkpointing=on), rollout) for on in (False, True))
    inputs = inputs_of(rollout).numel() * 32 * 4  # bytes of one tensor (B, S, H)
    # The inputs of two layers and of the final norm, what that norm saves, cosines and sines, ids.
    assert 2 * inputs < again < 6 * inputs
    assert again < 0.2 * plain


def test_layers_are_recomputed_once_and_only_if_gradients_are_enabled():
    calls = []
    policy = make_policy("llama", gradient_checkpointing=True)
    policy.trunk.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    hidden = hidden_of(policy, torch.tensor([[4, 5, 6]]))
    assert len(calls) == 1
    hidden.sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        hidden_of(policy, torch.tensor([[4, 5, 6]]))
    assert len(calls) == 3
    assert not any(module.training for module in policy.model.modules())


def test_checkpointing_survives_a_copy_and_a_change_of_mode():
    policy = make_policy("llama", gradient_checkpointing=True)
    policy.train().eval()
    rollout = make_rollout()
    assert saved_bytes(policy, rollout) == saved_bytes(frozen_copy(policy).requires_grad_(True), rollout)


def test_the_value_model_is_checkpointed_as_well():
    rollout, results = make_rollout(), []
    for again in (False, True):
        value_model = RewardModel.from_causal_lm(tiny(), 4).computing(gradient_checkpointing=again)
        assert value_model.trunk.layers[0].gradient_checkpointing == again
        results.append(gradients(make_policy("llama", value_model), rollout, microbatch=4))
    assert all(torch.equal(results[1][name], gradient) for name, gradient in results[0].items())


def test_training_a_reward_model_is_bitwise_the_same():
    completions = (Example((4, 5), (6, 7, 2)), Example((4, 5), (9, 2)), Example((4, 5), (8, 8, 8, 2)))
    prompts, results = [RankedPrompt(completions, ((0, 1), (2, 1)))], []
    for again in (False, True):
        model = RewardModel.from_causal_lm(tiny(), 4).computing(gradient_checkpointing=again)
        assert model.trunk.layers[0].gradient_checkpointing == again
        fit_reward_model(model, prompts, prompts, RewardConfig(batch_size=1), pad_id=0, seed=0)
        results.append(model.state_dict())
    assert all(torch.equal(results[1][name], weight) for name, weight in results[0].items())


def test_a_trunk_without_checkpointable_layers_is_refused():
    class Bare(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"memory\.gradient_checkpointing: got True, expected False for Bare"):
        checkpoint_layers(Bare())


@pytest.mark.parametrize("kind", ["head", "backbone"])
def test_ppo_applies_the_settings_to_its_models(kind):
    settings = ["ppo.value_init=zero", f"ppo.value_model={kind}", "compute_dtype=bfloat16"]
    policy = make_ppo_policy(load_config(None, [*settings, "memory.gradient_checkpointing=true"]), tiny(), None)
    models = [policy] if kind == "head" else [policy, policy.value]
    for model in models:
        assert model.compute_dtype == torch.bfloat16
        assert all(layer.gradient_checkpointing for layer in model.trunk.layers)


def test_the_config_reaches_the_models():
    config = load_config(None, ["memory.gradient_checkpointing=true", "compute_dtype=bfloat16"])
    assert computing(config) == {"compute_dtype": torch.bfloat16, "gradient_checkpointing": True}
    assert computing(load_config(None)) == {"compute_dtype": None, "gradient_checkpointing": False}


class Wrapping(GradientCheckpointingLayer):
    """A layer that contains other layers which transformers can recompute."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, hidden, **options):
        for layer in self.inner:
            hidden = layer(hidden, **options)
        return hidden


def zamba2():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    mamba = {"mamba_d_state": 8, "mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 1, "use_mem_rope": True}
    layers = {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]}
    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=VOCABULARY, **sizes, **mamba, **layers, num_key_value_heads=2, initializer_range=0.2
    )
    return Zamba2ForCausalLM(config).eval()


def one_inside():
    model = tiny(initializer_range=0.2)
    model.model.layers[0] = Wrapping(model.model.layers[0])
    return model


def two_levels_and_a_shared_layer():
    model = tiny(initializer_range=0.2)
    first, second = model.model.layers
    model.model.layers[0] = Wrapping(Wrapping(first), second)
    return model


@pytest.mark.parametrize("build", [zamba2, one_inside, two_levels_and_a_shared_layer])
def test_layers_inside_a_layer_are_recomputed_with_it(build):
    rollout = make_rollout()
    expected = gradients(ActorCritic(build()), rollout, microbatch=4)
    found = gradients(ActorCritic(build(), gradient_checkpointing=True), rollout, microbatch=4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
