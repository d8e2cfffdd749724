"""Adapters on quantised weights: roles, references, sampling, training and files."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf_engine.model import ActorCritic, FrozenCopy, ValueHead, token_batch
from rlhf_engine.model.adapter_files import read_adapter, trained_on
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.pretrained import like
from rlhf_engine.model.references import AdapterOff
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.roles import POLICY, REFERENCE, REWARD, VALUE
from rlhf_engine.model.saving import load_policy, save_policy
from rlhf_engine.rollout import Generator, recompute
from tests.engine.helpers.adapted_models import SETTINGS, moved
from tests.engine.helpers.passes import logprobs_of
from tests.engine.helpers.quantised_models import QUANTS, layers, quantised, with_adapter
from tests.engine.helpers.tiny_models import tiny
from tests.engine.helpers.tiny_trainer import ROLLOUT, make_trainer

IDS = torch.arange(3, 33).reshape(2, 15)
BATCH = token_batch(IDS[:, :5], torch.tensor([5, 3]), IDS[:, 5:], torch.tensor([10, 7]), torch.arange(2))


def value_adapter(adapters):
    adapters.add(VALUE, 5, trained=True)
    moved(adapters, VALUE, seed=7)
    return RewardModel.sharing(adapters, VALUE, ValueHead.from_weights(torch.linspace(-0.3, 0.3, 32), 0.1))


def dequantised(model):
    """Return the same model with linear layers of the dequantised weights in their place."""
    for name, layer in layers(model).items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data, plain.bias = layer.dequantised(torch.float32), layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("quant", QUANTS)
def test_logprobs_and_gradients_are_those_on_the_dequantised_weights(tmp_path, quant, family):
    found = []
    for change in (lambda model: model, dequantised):
        adapters = Adapters.start(change(quantised(tmp_path, quant, family)), SETTINGS, 0)
        moved(adapters)
        policy = ActorCritic(adapters.model)
        logprobs = policy(BATCH, ("logprobs",)).logprobs
        logprobs.sum().backward()
        gradients = {name: p.grad for name, p in adapters.tensors(POLICY).items()}
        found.append((logprobs.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys() and len(ours) > 0
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quant", QUANTS)
def test_every_role_uses_its_adapter_on_the_same_weights(tmp_path, quant):
    model, adapters = with_adapter(tmp_path, quant)
    policy = ActorCritic(model, value_adapter(adapters))
    found = policy(BATCH, ("logprobs", "values"))
    alone, own = with_adapter(tmp_path, quant)
    assert torch.equal(found.logprobs, ActorCritic(alone)(BATCH, ("logprobs",)).logprobs)
    moved(own, POLICY, seed=7)
    own.copy(POLICY, dict(adapters.tensors(VALUE)), "test")
    assert torch.equal(found.values, policy.value.head(ActorCritic(alone)(BATCH, ("hidden",)).hidden))
    stored = [layer.weight.data_ptr() for layer in layers(model).values()]
    assert len(stored) == len(set(stored)) == 14


@pytest.mark.parametrize("quant", QUANTS)
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path, quant):
    def gradients(checkpointed):
        model, adapters = with_adapter(tmp_path, quant)
        policy = ActorCritic(model, value_adapter(adapters), gradient_checkpointing=checkpointed)
        found = policy(BATCH, ("logprobs", "values"))
        (found.logprobs.sum() + found.values.square().sum()).backward()
        return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}

    plain, found = gradients(False), gradients(True)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    assert {name.rpartition("lora_")[2][2:] for name in found if "lora_" in name} == {"policy.weight", "value.weight"}


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("quant", QUANTS)
def test_adapter_off_has_the_bits_of_the_base_model_after_updates(tmp_path, quant, family):
    model, _ = with_adapter(tmp_path, quant, family, change=False)
    trainer = make_trainer(model=model, updates=4)
    assert isinstance(trainer.reference, AdapterOff)
    logs = [trainer.step() for _ in range(4)]
    assert abs(logs[-1]["kl"]) > 1e-3 and all(log["logprob_deviation"] < 1e-4 for log in logs)
    base = ActorCritic(quantised(tmp_path, quant, family))
    for batch in trainer.collect().batches(torch.arange(16), microbatch=4):
        expected = base(batch, ("logprobs",)).logprobs
        assert torch.equal(trainer.reference.logprobs(batch, temperature=1.0), expected)
        assert not torch.equal(trainer.policy(batch, ("logprobs",)).logprobs, expected)


@pytest.mark.parametrize("cache", ["slots", "paged"])
@pytest.mark.parametrize("quant", QUANTS)
def test_the_ratio_of_the_policy_to_itself_is_1(tmp_path, quant, cache):
    """Sampled log-probs are those of a fresh pass, and do not depend on the sequences that are decoded together."""
    found = []
    for size in (16, 3):
        model, _ = with_adapter(tmp_path, quant)
        policy = ActorCritic(model)
        settings = type(ROLLOUT)(max_prompt_tokens=8, max_response_tokens=10, batch_size=size, cache=cache)
        sampler = Generator(policy, settings, eos_token_ids=(2,), pad_token_id=0, seed=1)
        rollout = sampler.generate([torch.arange(3, 6 + n % 4) for n in range(16)], torch.arange(16))
        fresh = recompute(policy, rollout, ("logprobs",), microbatch=4)["logprobs"]
        torch.testing.assert_close(rollout.logprobs, fresh, rtol=0, atol=1e-5)
        found.append(rollout)
    assert torch.equal(found[0].response_ids, found[1].response_ids)
    assert torch.equal(found[0].logprobs, found[1].logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", QUANTS)
def test_adapters_have_the_dtype_of_the_model_and_only_they_are_trained(tmp_path, quant, dtype):
    model, adapters = with_adapter(tmp_path, quant, change=False, dtype=dtype)
    trainer = make_trainer(model=model, ema_decay=0.5)
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    log = trainer.step()
    changed = {name for name, p in trainer.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, _ in trainer.policy.stored()}
    assert {p.dtype for p in adapters.tensors(POLICY).values()} == {dtype}
    assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
    assert log["logprob_deviation"] < (1e-4 if dtype == torch.float32 else 0.1)
    average = dict(trainer.update_rule.average.model.named_parameters())
    shared = {name for name, p in trainer.policy.named_parameters() if average.get(name) is p}
    assert {name for name in before if name.endswith((".scale", "base_layer.weight"))} <= shared


@pytest.mark.parametrize("quant", QUANTS)
def test_a_frozen_copy_shares_codes_and_scales(tmp_path, quant):
    model, adapters = with_adapter(tmp_path, quant)
    policy = ActorCritic(model)
    reference = FrozenCopy(policy)
    theirs = layers(reference.model.model)
    assert all(
        theirs[name].weight is one.weight and theirs[name].scale is one.scale for name, one in layers(model).items()
    )
    before = reference.logprobs(BATCH, temperature=1.0)
    assert torch.equal(before, policy(BATCH, ("logprobs",)).logprobs)
    moved(adapters, seed=3)
    assert torch.equal(reference.logprobs(BATCH, temperature=1.0), before)


def test_both_references_give_a_run_the_same_bits(tmp_path):
    logs = []
    for kind in ("adapter_off", "frozen_copy"):
        trainer = make_trainer(model=with_adapter(tmp_path, "nf4", change=False)[0], reference=kind)
        logs.append([{k: v for k, v in trainer.step().items() if "second" not in k and "mb" not in k} for _ in "12"])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_trpo_steps_the_adapter_within_its_bound(tmp_path, quant):
    model, adapters = with_adapter(tmp_path, quant, change=False)
    trainer = make_trainer(
        model=model, value_model=value_adapter(adapters), objective="trpo", attention="eager", entropy_coef=0.0
    )
    log = trainer.step()
    assert 0 < log["trpo_kl"] <= trainer.config.trpo.max_kl and log["trpo_gain"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_policy_is_saved_as_an_adapter_with_its_format(tmp_path, family):
    """The fingerprint is that of the folder's files, so that the adapter fits the model in every format."""
    base = tmp_path / "base"
    model, adapters = with_adapter(base, "nf4", family)
    policy, place = ActorCritic(model, value_adapter(adapters)), tmp_path / "policy"
    place.mkdir()
    save_policy(place, policy, None)
    assert trained_on(place) == "nf4" and trained_on(base) is None
    found = read_adapter(place)
    assert all(torch.equal(found.tensors[name], p) for name, p in adapters.tensors(POLICY).items())
    loaded = load_policy(place, quant="nf4")
    ours, theirs = (one(BATCH, ("logprobs", "values")) for one in (policy, loaded))
    assert torch.equal(ours.logprobs, theirs.logprobs) and torch.equal(ours.values, theirs.values)
    assert loaded.value.trunk is loaded.trunk and like(loaded.model)["quant"] == "nf4"
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place).eval()
    other = load_policy(place).model(input_ids=IDS).logits
    torch.testing.assert_close(wrapped(input_ids=IDS).logits, other, rtol=1e-5, atol=1e-5)


def test_a_reward_adapter_scores_on_the_policys_trunk_as_on_its_own(tmp_path):
    base, place = tmp_path / "base", tmp_path / "rm"
    model, adapters = with_adapter(base, "int8")
    policy = ActorCritic(model, value_adapter(adapters))
    place.mkdir()
    policy.value.save(place)
    own = RewardModel.load(place, quant="int8")
    shared = RewardModel.adding(adapters, REWARD, place)
    lengths = torch.tensor([15, 9])
    assert torch.equal(own(IDS, lengths), shared(IDS, lengths)) and shared.trunk is policy.trunk
    assert len(layers(own.trunk)) == 14
    _, theirs = with_adapter(tmp_path / "other", "nf4", seed=3)  # a policy on different weights
    with pytest.raises(ValueError, match="whose weights differ"):
        RewardModel.adding(theirs, REWARD, place)


@pytest.mark.parametrize("quant", QUANTS)
def test_a_reward_model_with_its_own_trunk_is_quantised_too(tmp_path, quant):
    model = tiny(initializer_range=0.1)
    RewardModel.from_causal_lm(model, 0).save(tmp_path)
    lengths = torch.tensor([15, 9])
    found, expected = (RewardModel.load(tmp_path, quant=one)(IDS, lengths) for one in (quant, "none"))
    assert len(layers(RewardModel.load(tmp_path, quant=quant).trunk)) == 14
    assert 0 < (found - expected).abs().max() < 0.5


def test_merging_is_refused_with_advice(tmp_path):
    _, adapters = with_adapter(tmp_path, "nf4")
    with pytest.raises(ValueError, match=r"model\.quant: got 'nf4', expected 'none' to merge an adapter.*`rlhf merge`"):
        adapters.merge(POLICY)
    assert POLICY in adapters.names and REFERENCE not in adapters.names
    logprobs_of(ActorCritic(adapters.model), IDS)
