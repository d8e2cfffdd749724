"""Sampling from weights with the policy's adapter added to them (`rollout.merge_adapters`)."""

from dataclasses import replace

import pytest
import torch

from rlhf_engine.config import RolloutConfig
from rlhf_engine.memory import Arena
from rlhf_engine.model import ActorCritic
from rlhf_engine.model.roles import POLICY
from rlhf_engine.planner import MemoryPlan
from rlhf_engine.rollout import Generator, recompute
from rlhf_engine.rollout.decode.protocol import new_memory
from tests.engine.helpers.adapted_models import adapted, moved
from tests.engine.helpers.plans import RUN
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import ROLLOUT, make_trainer

IDS = torch.arange(3, 33).reshape(2, 15)
PROMPTS, NUMBERS = [torch.arange(3, 6 + n % 4) for n in range(16)], torch.arange(16)


def sampler(model, **settings):
    config = RolloutConfig(max_prompt_tokens=8, max_response_tokens=10, batch_size=16, **settings)
    return Generator(ActorCritic(model), config, eos_token_ids=(2,), pad_token_id=0, seed=1)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("cache", ["slots", "paged"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_every_rollout_samples_from_the_current_adapter(family, cache):
    """The log-probs are those of a forward pass with the separate products, up to float32 rounding, after each change."""
    model, adapters = adapted(family)
    generator, before = sampler(model, cache=cache, merge_adapters="always"), weights(model)
    first = generator.generate(PROMPTS, NUMBERS)
    fresh = recompute(generator.policy, first, ("logprobs",), microbatch=4)["logprobs"]
    torch.testing.assert_close(first.logprobs, fresh, rtol=0, atol=1e-5)
    moved(adapters, seed=3, scale=0.5)
    second = generator.generate(PROMPTS, NUMBERS)
    fresh = recompute(generator.policy, second, ("logprobs",), microbatch=4)["logprobs"]
    torch.testing.assert_close(second.logprobs, fresh, rtol=0, atol=2e-5)
    assert adapters.active == POLICY
    frozen = {name: tensor for name, tensor in weights(model).items() if "lora_B" not in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.items())


def test_merged_weights_are_the_sums_rounded_once():
    model, adapters = adapted(dtype=torch.bfloat16)
    layer = model.model.layers[1].mlp.down_proj
    a, b = layer.lora_A[POLICY].weight.double(), layer.lora_B[POLICY].weight.double()
    exact = layer.base_layer.weight.double() + layer.scaling[POLICY] * b @ a
    with adapters.merged(POLICY, new_memory):
        found = layer.base_layer.weight
        assert layer.disable_adapters and found.dtype == torch.bfloat16
        wrong = (found.double() - exact).abs() > (exact.abs() * 2**-8 + 1e-9)
        assert not wrong.any()
        assert (found == exact.to(torch.bfloat16)).float().mean() > 0.99


def test_another_adapter_is_refused_while_the_weights_contain_one():
    _, adapters = adapted()
    adapters.add("value", 3, trained=True)
    with adapters.merged(POLICY, new_memory):
        message = "cannot switch to 'value' while the weights contain 'policy'"
        with pytest.raises(RuntimeError, match=message), adapters.using("value"):
            pass
        with pytest.raises(RuntimeError, match="cannot switch to None"), adapters.using(None):
            pass
    with adapters.using("value"):
        assert adapters.active == "value"


def test_an_error_restores_the_weights():
    model, adapters = adapted()
    before = weights(model)
    with pytest.raises(ZeroDivisionError), adapters.merged(POLICY, new_memory):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert adapters.active == POLICY


def test_a_run_keeps_merged_weights_in_the_arena():
    """The phase has exactly the bytes of keys, values and merged weights, and nothing is referenced after it."""
    losses = []
    for merge in ("always", "never"):
        model, adapters = adapted(change=False)
        trainer = make_trainer(model=model, rollout=replace(ROLLOUT, merge_adapters=merge))
        assert isinstance(trainer.arena, Arena)
        added = adapters.merged_bytes(POLICY) if merge == "always" else 0
        assert trainer.arena.sizes["generate"] == trainer.generator.cache_bytes + added
        losses.append([trainer.step() for _ in "12"])
        assert all(log["logprob_deviation"] < 1e-5 for log in losses[-1])
    assert losses[0][0]["policy_loss"] == losses[1][0]["policy_loss"]  # a new adapter adds zeros
    assert losses[0][1]["kl"] == pytest.approx(losses[1][1]["kl"], rel=1e-3)


def test_a_run_goes_on_merged_or_separate_as_it_began():
    """`auto` depends on settings that a resumed run may change, and the bits of samples depend on what it chose."""
    merged, separate = (
        make_trainer(model=adapted(change=False)[0], rollout=replace(ROLLOUT, merge_adapters=merge))
        for merge in ("always", "never")
    )
    with pytest.raises(
        ValueError, match="of a run with merged adapters, and this run is planned without; set it to always"
    ):
        separate.load_state(merged.state())
    with pytest.raises(
        ValueError, match="of a run without merged adapters, and this run is planned with; set it to never"
    ):
        merged.load_state(separate.state())
    old = {name: value for name, value in merged.state().items() if name != "merges"}
    separate.load_state(old)  # a checkpoint of an earlier version


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.merge_adapters: got 'always' for a model without adapters"):
        sampler(tiny(), merge_adapters="always")


def test_auto_merges_where_the_plan_has_memory_to_spare():
    run = replace(RUN, adapter=2, merge_adapters="auto", slots=1)
    free = MemoryPlan.of(run)
    assert free.workload.merge_adapters == "always"
    assert free.phases["generate"]["merged_weights"] == 4 * run.policy.layer_matrices
    separate = MemoryPlan.of(replace(run, merge_adapters="never"))
    assert free.peak == separate.peak  # training needs more than sampling
    for half in ({"dtype": "bfloat16"}, {"compute_dtype": "bfloat16"}, {"quant": "int8"}):
        assert MemoryPlan.of(replace(run, **half)).workload.merge_adapters == "never", half
    assert MemoryPlan.of(replace(run, quant="int8")).workload.merge_adapters == "never"
    many = replace(run, rollout_batch=64, slots=64, microbatch=1)
    assert MemoryPlan.of(many).phases.keys() and MemoryPlan.of(many).workload.merge_adapters == "never"
    room = MemoryPlan.of(replace(many, merge_adapters="always")).peak
    assert MemoryPlan.of(replace(many, budget=room)).workload.merge_adapters == "always"
    assert MemoryPlan.of(replace(many, budget=room - 1)).workload.merge_adapters == "never"
