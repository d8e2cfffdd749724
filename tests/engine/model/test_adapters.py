"""A policy that peft wrapped or injected adapters into: log-probs, training, sampling, and what is rejected."""

import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)

from rlhf_engine.config import MemoryConfig, OptimConfig, PPOConfig, RunConfig
from rlhf_engine.model import ActorCritic, FrozenCopy
from rlhf_engine.model.saving import save_policy
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.rollout import Generator, recompute
from tests.engine.helpers.passes import logprobs_of
from tests.engine.helpers.tiny_models import VOCABULARY, tiny
from tests.engine.helpers.tiny_trainer import ROLLOUT, SETTINGS, target_share

TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]
LORA = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.5)


def make_adapted(wrap, scale=0.1):
    """Return a model with adapters that change its log-probs."""
    model = tiny(initializer_range=0.1)
    wrapped = get_peft_model(model, LORA) if wrap else inject_adapter_in_model(LORA, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("wrap", [True, False])
def test_logprobs_are_those_of_the_adapted_model(wrap):
    model, base = make_adapted(wrap).eval(), tiny(initializer_range=0.1)
    ids = torch.arange(3, 33).reshape(2, 15)
    expected = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    found = logprobs_of(ActorCritic(model), ids)  # without dropout in the adapters
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - logprobs_of(ActorCritic(base), ids)).abs().max() > 1e-3


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("state", ["resident", "host"])
def test_an_update_trains_the_adapters_and_samples_from_them(wrap, state):
    policy = ActorCritic(make_adapted(wrap, scale=0.0))
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    prompts = [torch.arange(3, 6 + n) for n in range(4)]
    config = RunConfig(
        ppo=PPOConfig(**SETTINGS, optim=OptimConfig(lr=1e-2)),
        rollout=ROLLOUT,
        memory=MemoryConfig(optimizer_state=state),
    )
    generator = Generator(policy, ROLLOUT, eos_token_ids=VOCABULARY, pad_token_id=0, seed=1)
    trainer = build_trainer(policy, None, target_share, prompts, config, generator=generator)
    first, second = trainer.step(), trainer.step()
    assert abs(first["kl"]) < 1e-4 and second["kl"] > 1e-3  # the reference is the model before its adapters changed
    moved = {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and all("lora_" in name or name.startswith("value.") for name in moved)
    assert any("lora_A" in name for name in moved) and any("lora_B" in name for name in moved)
    rollout = generator.generate(prompts, torch.arange(4))
    fresh = recompute(policy, rollout, ("logprobs",), microbatch=4)["logprobs"]
    torch.testing.assert_close(rollout.logprobs, fresh, rtol=0, atol=1e-5)


def test_a_frozen_copy_includes_the_adapters():
    policy = ActorCritic(make_adapted(True))
    ids = torch.arange(3, 15)[None]
    reference, before = FrozenCopy(policy), logprobs_of(policy, ids)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.add_(0.1 * ("lora_B" in name))
    assert torch.equal(logprobs_of(reference.model, ids), before)
    assert not torch.equal(logprobs_of(policy, ids), before)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        HRAConfig(r=2, target_modules=["v_proj"]),
    ],
    ids=["lora", "ia3", "hra"],
)
def test_a_checkpoint_of_adapters_is_refused(tmp_path, config):
    policy = ActorCritic(get_peft_model(tiny("llama"), config))
    with pytest.raises(ValueError, match=r"policy: the model has adapters .*, which a checkpoint cannot store"):
        save_policy(tmp_path, policy, None)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["prompt", "prefix", "encoder"],
)
def test_an_adapter_that_adds_tokens_is_refused(config):
    """Without this check the model inside the wrapper would run, without the trained tokens."""
    with pytest.raises(
        ValueError, match=rf"model: got the peft adapter 'default', a {type(config).__name__}, which adds"
    ):
        ActorCritic(get_peft_model(tiny("llama"), config))
