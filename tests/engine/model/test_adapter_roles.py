"""Adapters of several roles on one trunk: the switch, the reference, sampling, what is trained, and files."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_engine.config import AdapterConfig, MemoryConfig, OptimConfig, RolloutConfig
from rlhf_engine.model import ActorCritic, FrozenCopy, ValueHead
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.references import AdapterOff
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.roles import POLICY, REFERENCE, REWARD, VALUE
from rlhf_engine.model.saving import copy_weights, load_policy, save_policy
from rlhf_engine.optim.build import build_optimizer
from rlhf_engine.rollout import Generator, recompute
from tests.engine.helpers.adapted_models import SETTINGS, adapted, moved
from tests.engine.helpers.passes import logprobs_of
from tests.engine.helpers.tiny_models import VOCABULARY, tiny
from tests.engine.helpers.tiny_trainer import make_trainer

IDS = torch.arange(3, 33).reshape(2, 15)
TRAINED = {"lora_A", "lora_B", "value"}


def value_adapter(adapters):
    """Return a value function with its own adapter and a head that is not zero."""
    adapters.add(VALUE, 5, trained=True)
    moved(adapters, VALUE, seed=7)
    return RewardModel.sharing(adapters, VALUE, ValueHead.from_weights(torch.linspace(-0.3, 0.3, 32), 0.1))


def base_logprobs(family, batch):
    return ActorCritic(tiny(family, initializer_range=0.1))(batch, ("logprobs",)).logprobs


# ---- the switch ----


def test_a_new_adapter_changes_nothing_and_a_moved_one_does():
    _, adapters = adapted(change=False)
    policy, base = ActorCritic(adapters.model), ActorCritic(tiny(initializer_range=0.1))
    assert torch.equal(logprobs_of(policy, IDS), logprobs_of(base, IDS))
    moved(adapters)
    assert (logprobs_of(policy, IDS) - logprobs_of(base, IDS)).abs().max() > 1e-3


def test_every_role_uses_its_adapter_for_a_whole_call():
    """The value's pass is inside the policy's call; each role's numbers are those of a model with its adapter only."""
    model, adapters = adapted()
    policy = ActorCritic(model, value_adapter(adapters))
    batch = policy_batch()
    found = policy(batch, ("logprobs", "values", "hidden"))
    alone, own = adapted()
    moved(own, POLICY, seed=7)
    own.copy(POLICY, dict(adapters.tensors(VALUE)), "test")
    hidden = ActorCritic(alone)(batch, ("hidden",)).hidden
    assert torch.equal(found.values, policy.value.head(hidden))
    plain, _ = adapted()
    assert torch.equal(found.logprobs, ActorCritic(plain)(batch, ("logprobs",)).logprobs)
    assert adapters.active == POLICY  # as before the call


def policy_batch():
    from rlhf_engine.model import token_batch

    return token_batch(IDS[:, :5], torch.tensor([5, 3]), IDS[:, 5:], torch.tensor([10, 7]), torch.arange(2))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_both_adapters_in_one_backward_pass(checkpointed):
    """A layer that is recomputed in the backward pass uses the adapter of its forward pass."""

    def gradients(checkpointed):
        model, adapters = adapted()
        value = value_adapter(adapters)
        policy = ActorCritic(model, value, gradient_checkpointing=checkpointed)
        found = policy(policy_batch(), ("logprobs", "values"))
        (found.logprobs.sum() + found.values.square().sum()).backward()
        return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}

    plain, found = gradients(False), gradients(checkpointed)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    assert {name.rpartition("lora_")[2][2:] for name in found if "lora_" in name} == {"policy.weight", "value.weight"}
    assert not any("base_layer" in name or "embed" in name for name in found)


# ---- references ----


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_adapter_off_has_the_bits_of_the_base_model_after_updates(family):
    model, _ = adapted(family, change=False)
    trainer = make_trainer(model=model, updates=10)
    assert isinstance(trainer.reference, AdapterOff)
    for _ in range(10):
        log = trainer.step()
    assert abs(log["kl"]) > 1e-3
    rollout = trainer.collect()
    base = ActorCritic(tiny(family, initializer_range=0.1))
    for batch in rollout.batches(torch.arange(16), microbatch=4):
        expected = base(batch, ("logprobs",)).logprobs
        assert torch.equal(trainer.reference.logprobs(batch, temperature=1.0), expected)
        assert not torch.equal(trainer.policy(batch, ("logprobs",)).logprobs, expected)


def test_a_reference_with_an_adapter_has_the_bits_of_the_policy_that_the_run_started_from():
    """After SFT with an adapter the reference is the SFT policy, not the base model."""
    model, adapters = adapted()
    adapters.add(REFERENCE, adapters.tensors(POLICY), trained=False)
    trainer, expected = make_trainer(model=model), ActorCritic(adapted()[0])
    assert abs(trainer.step()["kl"]) < 1e-4 < abs(trainer.step()["kl"])
    batch = policy_batch()
    assert torch.equal(trainer.reference.logprobs(batch, temperature=1.0), expected(batch, ("logprobs",)).logprobs)


def test_a_frozen_copy_of_a_policy_with_adapters_shares_the_frozen_weights():
    model, _ = adapted()
    policy = ActorCritic(model)
    reference = FrozenCopy(policy)
    theirs = dict(reference.model.named_parameters())
    for name, weight in policy.model.named_parameters(prefix="model"):
        assert (theirs[name] is weight) == ("lora_" not in name), name
    batch = policy_batch()
    assert torch.equal(reference.logprobs(batch, temperature=1.0), policy(batch, ("logprobs",)).logprobs)
    before = reference.logprobs(batch, temperature=1.0)
    moved(policy.adapters, seed=3)
    assert torch.equal(reference.logprobs(batch, temperature=1.0), before)
    assert not torch.equal(policy(batch, ("logprobs",)).logprobs, before)


def test_both_references_give_a_run_the_same_bits():
    logs = []
    for kind in ("adapter_off", "frozen_copy"):
        trainer = make_trainer(model=adapted(change=False)[0], reference=kind)
        logs.append([{k: v for k, v in trainer.step().items() if "second" not in k and "mb" not in k} for _ in "12"])
    assert logs[0] == logs[1]


def test_adapter_off_needs_an_adapter():
    with pytest.raises(ValueError, match="policy: got a model without adapters, expected one with; use a FrozenCopy"):
        make_trainer(reference="adapter_off")


# ---- sampling ----


@pytest.mark.parametrize("cache", ["slots", "paged"])
def test_a_changed_adapter_changes_what_the_next_rollout_samples(cache):
    settings = RolloutConfig(max_prompt_tokens=8, max_response_tokens=10, batch_size=16, cache=cache)
    model, adapters = adapted(change=False)
    policy = ActorCritic(model)
    sampler = Generator(policy, settings, eos_token_ids=(2,), pad_token_id=0, seed=1)
    prompts, numbers = [torch.arange(3, 6 + n % 4) for n in range(16)], torch.arange(16)
    first, again = (sampler.generate(prompts, numbers) for _ in "12")
    assert torch.equal(first.response_ids, again.response_ids)
    moved(adapters, scale=0.5)
    second = sampler.generate(prompts, numbers)
    assert second.response_ids.shape != first.response_ids.shape or not torch.equal(
        second.response_ids, first.response_ids
    )
    for rollout in (first, second):
        policy.adapters.make_default(POLICY)
        fresh = recompute(policy, rollout, ("logprobs",), microbatch=4)["logprobs"]
        if rollout is second:
            torch.testing.assert_close(rollout.logprobs, fresh, rtol=0, atol=1e-5)
        else:
            assert (rollout.logprobs - fresh).abs().max() > 1e-2  # the old samples are not those of the new adapter


@pytest.mark.parametrize("cache", ["slots", "paged"])
def test_samples_do_not_depend_on_the_batch(cache):
    """The products of an adapter have as few rows as those of the layer, and the same bits for every number of rows."""
    found = []
    for size in (16, 3):
        settings = RolloutConfig(max_prompt_tokens=8, max_response_tokens=10, batch_size=size, cache=cache)
        sampler = Generator(ActorCritic(adapted()[0]), settings, eos_token_ids=(2,), pad_token_id=0, seed=1)
        found.append(sampler.generate([torch.arange(3, 6 + n % 4) for n in range(16)], torch.arange(16)))
    assert torch.equal(found[0].response_ids, found[1].response_ids)
    assert torch.equal(found[0].logprobs, found[1].logprobs)


# ---- what is trained ----


@pytest.mark.parametrize("state", ["resident", "host"])
def test_only_adapters_and_heads_are_in_the_optimizer_and_the_average(state):
    model, adapters = adapted(change=False)
    value = value_adapter(adapters)
    trainer = make_trainer(model=model, value_model=value, memory=MemoryConfig(optimizer_state=state), ema_decay=0.5)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    trainer.step()
    changed = {name for name, p in trainer.policy.named_parameters() if not torch.equal(p, before[name])}
    stored = {name for name, _ in trainer.policy.stored()}
    stepped = {id(p) for group in trainer.update_rule.optimizer.param_groups for p in group["params"]}
    assert changed == stored == {name for name, p in trainer.policy.named_parameters() if id(p) in stepped}
    assert all("lora_" in name or name.startswith("value.head") for name in stored)
    average = trainer.update_rule.average
    names = dict(average.model.named_parameters())
    shared = [name for name, p in trainer.policy.named_parameters() if names.get(name) is p]
    assert {name for name in before if "lora_" not in name and not name.startswith("value.")} == set(shared)


@pytest.mark.parametrize("state", ["resident", "host"])
def test_adapters_have_a_larger_learning_rate_than_heads(state):
    optim = OptimConfig(lr=1e-3, schedule="linear", final_lr_share=0.5)
    model, adapters = adapted(change=False)
    memory = MemoryConfig(optimizer_state=state)
    trainer = make_trainer(model=model, value_model=value_adapter(adapters), memory=memory, optim=optim, updates=1)
    trainer.step()
    heads = {id(p) for p in trainer.policy.value.head.parameters()}
    for group in trainer.update_rule.optimizer.param_groups:
        own = [id(p) in heads for p in group["params"]]
        assert own and len(set(own)) == 1
        assert group["lr"] == pytest.approx(5e-4 * (1 if own[0] else 10))  # at the last step


def test_the_value_warm_up_changes_only_the_value_adapter():
    model, adapters = adapted(change=False)
    trainer = make_trainer(model=model, value_model=value_adapter(adapters), value_warmup=1)
    before = {name: {k: p.detach().clone() for k, p in adapters.tensors(name).items()} for name in (POLICY, VALUE)}
    trainer.step()
    for name in (POLICY, VALUE):
        same = [torch.equal(p, before[name][k]) for k, p in adapters.tensors(name).items()]
        assert all(same) if name == POLICY else not any(same)


def test_trpo_steps_the_adapter_within_its_bound():
    model, adapters = adapted(change=False)
    trainer = make_trainer(
        model=model, value_model=value_adapter(adapters), objective="trpo", attention="eager", entropy_coef=0.0
    )
    base = model.model.layers[0].mlp.up_proj.base_layer.weight.clone()
    log = trainer.step()
    assert 0 < log["trpo_kl"] <= trainer.config.trpo.max_kl and log["trpo_gain"] > 0
    assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, base)


def test_half_precision_adapters_have_float32_masters_and_averages():
    model, adapters = adapted(change=False, dtype=torch.bfloat16)
    trainer = make_trainer(model=model, ema_decay=0.5)
    log = trainer.step()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for tensor in adapters.tensors(POLICY).values():
        master = trainer.update_rule.optimizer.tensors_of(tensor)["master"]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), tensor)
    assert {p.dtype for _, p in trainer.update_rule.average.model.stored()} == {torch.float32}
    assert log["logprob_deviation"] < 0.1


# ---- files ----


@pytest.fixture
def saved(tmp_path):
    """Return a base folder and a policy with adapters on it."""
    folder = tmp_path / "base"
    tiny(initializer_range=0.1).save_pretrained(folder)
    model = tiny(initializer_range=0.1)
    adapters = Adapters.start(model, SETTINGS, 0, folder)
    moved(adapters)
    return folder, ActorCritic(model, value_adapter(adapters))


def test_a_policy_is_saved_as_an_adapter_and_loads_with_the_same_bits(saved, tmp_path):
    base, policy = saved
    place = tmp_path / "policy"
    place.mkdir()
    save_policy(place, policy, None)
    loaded = load_policy(place)
    batch, want = policy_batch(), ("logprobs", "values")
    ours, theirs = policy(batch, want), loaded(batch, want)
    assert torch.equal(ours.logprobs, theirs.logprobs) and torch.equal(ours.values, theirs.values)
    assert loaded.value.trunk is loaded.trunk
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place).eval()
    torch.testing.assert_close(wrapped(input_ids=IDS).logits, policy.model(input_ids=IDS).logits, rtol=0, atol=0)
    again = copy.deepcopy(policy)
    with torch.no_grad():
        for _, tensor in again.stored():
            tensor.add_(1)
    copy_weights(place, again)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(policy.stored(), again.stored(), strict=True))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_a_merged_model_has_the_same_logits_and_no_adapters(family):
    model, adapters = adapted(family)
    expected = model(input_ids=IDS).logits
    names = {name for name, _ in tiny(family).named_parameters()}
    adapters.merge(POLICY)
    assert {name for name, _ in model.named_parameters()} == names
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())


def test_a_reward_adapter_on_the_policys_trunk_scores_like_its_own_model(saved, tmp_path):
    _, policy = saved
    place = tmp_path / "rm"
    place.mkdir()
    policy.value.save(place)
    own = RewardModel.load(place)
    shared = RewardModel.adding(policy.adapters, REWARD, place)
    ids, lengths = IDS, torch.tensor([15, 9])
    assert torch.equal(own(ids, lengths), shared(ids, lengths))
    assert not any(p.requires_grad for p in policy.adapters.tensors(REWARD).values())
    assert shared.trunk is policy.trunk


# ---- refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ("q_proj", "qkv")},
            "adapter.targets: got 'qkv', which matches no linear layer of LlamaForCausalLM; it has "
            "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
        ),
        ({"targets": ("lm_head",)}, "adapter.targets: got the output layer lm_head, which shares its weight"),
    ],
)
def test_targets_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Adapters(tiny("llama_tied"), AdapterConfig(rank=2, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dora": True}, "dora: got True, expected False: DoRA is not supported"),
        ({"dropout": 0.1}, "dropout: got 0.1, expected 0.0"),
        ({"targets": ()}, "targets: got an empty list"),
        ({"targets": ("all-linear", "q_proj")}, "all-linear includes the other layers"),
    ],
)
def test_methods_that_are_not_supported_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(rank=2, **settings)


def test_mistakes_in_python_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"adapter\.rank: got 0, expected at least 1"):
        Adapters.start(tiny(), AdapterConfig(), 0)
    model, _ = adapted()
    with pytest.raises(ValueError, match="model: got a LlamaForCausalLM that has adapters already"):
        Adapters.start(model, SETTINGS, 0)
    with pytest.raises(ValueError, match="the folder of their model is not known; pass it to"):
        save_policy(tmp_path, ActorCritic(model), None)


def test_an_adapter_that_goes_on_has_the_learning_rate_of_the_new_run():
    model, adapters = adapted()
    adapters.go_on(replace(SETTINGS, lr_scale=3.0), "test")
    adapters.add(VALUE, 0, trained=True)
    groups = build_optimizer(model, OptimConfig(lr=1e-3)).param_groups
    assert [group["lr"] for group in groups] == [3e-3]


def test_an_adapter_on_a_subset_of_layers_and_on_the_head():
    settings = AdapterConfig(rank=2, targets=("layers.1.mlp.up_proj", "lm_head"), rslora=True)
    model, adapters = adapted(settings=settings)
    assert adapters.places[POLICY] == ["model.layers.1.mlp.up_proj", "lm_head"]
    expected = model(input_ids=IDS).logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs_of(ActorCritic(model), IDS), expected, rtol=1e-5, atol=1e-5)
    assert model.lm_head.base_layer.weight.shape[0] == VOCABULARY
