"""Matrix products in bfloat16 with weights, gradients and log-probs in float32."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_engine.config import RolloutConfig, load_config
from rlhf_engine.model import ActorCritic, TokenBatch, ValueHead
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.rollout import Generator, recompute
from tests.engine.helpers.passes import hidden_of
from tests.engine.helpers.rollouts import gradients, make_rollout
from tests.engine.helpers.tiny_models import VOCABULARY, tiny
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

BF16 = torch.bfloat16


def make_policy(family="llama", **settings) -> ActorCritic:
    return ActorCritic(
        tiny(family, initializer_range=0.2), ValueHead.from_weights(torch.linspace(-0.3, 0.4, 32), 0.1), **settings
    )


def angle(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the cosine between two gradients."""
    a, b = (torch.cat([x.double().flatten() for x in one.values()]) for one in (found, expected))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2_tied", "gemma2"])
def test_gradients_are_float32_and_near_those_of_float32(family):
    rollout = make_rollout()
    expected = gradients(make_policy(family), rollout, microbatch=4)
    found = gradients(make_policy(family, compute_dtype=BF16), rollout, microbatch=4)
    assert found.keys() == expected.keys()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert 0.999 < angle(found, expected) < 1.0 - 1e-12  # and bfloat16 was used: the two are not equal


def test_products_are_bfloat16_and_the_residual_stream_is_float32():
    policy, seen = make_policy(compute_dtype=BF16), {}
    layer = policy.trunk.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda module, args, output: seen.update(product=output.dtype))
    layer.register_forward_hook(lambda module, args, output: seen.update(stream=output.dtype))
    batch = TokenBatch(input_ids=torch.tensor([[4, 5, 6]]), ids=torch.tensor([5, 6, 7]))
    outputs = policy(batch, ("hidden", "logits", "logprobs", "values"))
    assert (seen["product"], seen["stream"], outputs.hidden.dtype) == (BF16, torch.float32, BF16)
    assert outputs.logprobs.dtype == outputs.values.dtype == torch.float32
    assert outputs.logits.dtype == BF16


def test_a_pass_without_gradient_does_not_affect_the_gradient_of_the_next():
    """Copies of weights that were created without autograd must not be reused in a pass that needs gradients."""
    rollout = make_rollout()
    fresh = gradients(make_policy(compute_dtype=BF16), rollout, microbatch=4)
    policy = make_policy(compute_dtype=BF16)
    recompute(policy, rollout, ("logprobs",), microbatch=4)
    with torch.no_grad(), policy.products():
        hidden_of(policy, rollout.response_ids)
    found = gradients(policy, rollout, microbatch=4)
    assert all(torch.equal(found[name], gradient) for name, gradient in fresh.items())


def test_a_changed_weight_is_copied_anew():
    policy, ids = make_policy(compute_dtype=BF16), torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        before = hidden_of(policy, ids)
        policy.trunk.layers[0].mlp.down_proj.weight.mul_(2.0)
        assert not torch.equal(hidden_of(policy, ids), before)


def test_sampled_logprobs_are_near_recomputed_ones():
    """Products of different shapes are rounded differently, by some of bfloat16's 8 bits per layer."""
    policy = make_policy(compute_dtype=BF16)
    generator = Generator(
        policy,
        RolloutConfig(max_prompt_tokens=8, max_response_tokens=12, batch_size=8),
        eos_token_ids=2,
        pad_token_id=0,
        seed=0,
    )
    stream = torch.Generator().manual_seed(6)
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=stream) for length in (1, 3, 8, 5)]
    rollout = generator.generate(prompts, torch.arange(4))
    found = recompute(policy, rollout, ("logprobs", "values"), microbatch=4)
    logprobs, values = found["logprobs"], found["values"]
    scale = float(rollout.logprobs.abs().max())
    assert float((logprobs - rollout.logprobs).abs().max()) < 0.02 * scale
    assert float((values - rollout.values).abs().max()) < 0.05 * float(values.abs().max())


class Copies(TorchDispatchMode):
    """Counts how often each of some weights is copied to a different dtype."""

    def __init__(self, weights):
        super().__init__()
        self.counts = {weight.data_ptr(): 0 for weight in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return function(*args, **(kwargs or {}))


def test_sampling_copies_a_weight_once():
    trainer = make_trainer()
    trainer.policy.compute_dtype = BF16
    layer = trainer.policy.trunk.layers[0]
    watched = [layer.mlp.up_proj.weight, layer.self_attn.q_proj.weight, trainer.policy.lm_weight]
    with Copies(watched) as copies, trainer.arena.phase("generate"):
        prompts = trainer.prompts(0, 4)
        rollout = trainer.generator.generate(prompts, torch.arange(4), allocate=trainer.arena.memory)
    assert rollout.response_ids.shape[1] > 2  # several steps, each of which uses all of these weights
    assert list(copies.counts.values()) == [1, 1, 1]


@pytest.mark.parametrize("value_model", [False, True])
def test_a_trainer_learns_with_bfloat16_products(value_model):
    values = RewardModel.from_causal_lm(tiny(), 4).computing(compute_dtype=BF16) if value_model else None
    trainer = make_trainer(value_model=values, ppo_epochs=1, minibatch=16)
    exact = make_trainer(ppo_epochs=1, minibatch=16).step()
    for model in (trainer.policy, trainer.reference):
        model.compute_dtype = BF16
    before, log = weights_of(trainer), trainer.step()
    # One step: the policies are the same up to the rounding of bfloat16, or of float32 where a CPU without bfloat16
    # instructions multiplies rounded inputs in float32.
    assert 1 <= log["ratio_max"] < 1.1
    assert abs(log["entropy"] - exact["entropy"]) > 1e-6
    assert all(weight.dtype == torch.float32 for weight in weights_of(trainer).values())
    assert not torch.equal(weights_of(trainer)["model.lm_head.weight"], before["model.lm_head.weight"])


def test_rewards_are_float32():
    plain = RewardModel.from_causal_lm(tiny(), 4)
    ids, lengths = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]]), torch.tensor([4, 2])
    expected = plain(ids, lengths)
    found = plain.computing(compute_dtype=BF16)(ids, lengths)
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_trpo_refuses_bfloat16_products():
    trpo = ["ppo.objective=trpo", "model.attention=eager"]
    load_config(None, trpo)
    with pytest.raises(
        ValueError, match=r"compute_dtype: got 'bfloat16' with ppo\.objective 'trpo', expected 'float32'"
    ):
        load_config(None, [*trpo, "compute_dtype=bfloat16"])
