"""References of every kind of policy in PPO: which are valid, what they compute, and how often the frozen layers run."""

import copy
from dataclasses import replace

import pytest
import torch

from rlhf_engine.config import AdapterConfig, MemoryConfig, RolloutConfig
from rlhf_engine.model import ActorCritic, FrozenCopy
from rlhf_engine.model.adapters import Adapters
from rlhf_engine.model.references import AdapterOff, Hydra
from rlhf_engine.model.reward_model import RewardModel
from rlhf_engine.model.top_layers import train_top
from rlhf_engine.ppo.ptx import PretrainStream
from tests.engine.helpers.tiny_models import VOCABULARY, tiny
from tests.engine.helpers.tiny_trainer import make_trainer, weights_of

POLICIES = ("full", "top", "lora", "lora_top")
VALID = {
    "full": {"frozen_copy": FrozenCopy, "auto": FrozenCopy},
    "top": {"hydra": Hydra, "frozen_copy": FrozenCopy, "auto": Hydra},
    "lora": {"adapter_off": AdapterOff, "frozen_copy": FrozenCopy, "auto": AdapterOff},
    "lora_top": {"adapter_off": AdapterOff, "hydra": Hydra, "frozen_copy": FrozenCopy, "auto": AdapterOff},
}
REFUSED = {
    ("full", "adapter_off"): "policy: got a model without adapters, expected one with",
    ("full", "hydra"): "ppo.reference: got 'hydra' for a policy that trains all layers, expected 'frozen_copy'",
    ("top", "adapter_off"): "policy: got a model without adapters, expected one with",
    ("lora", "hydra"): "ppo.reference: got 'hydra' for a policy that trains all layers, expected 'frozen_copy'",
}
NEW = {
    "full": ("",),
    "top": ("layers.2.", "layers.3.", "model.norm", "lm_head", "value."),
    "lora": ("lora_", "value."),
    "lora_top": ("lora_", "value."),
}
"""Parts of names, one of which each weight has that an update changes."""


def model_of(kind, dtype=torch.float32):
    model = tiny(initializer_range=0.1, num_hidden_layers=4).to(dtype)
    if "top" in kind:
        train_top(model, 2)
    if "lora" in kind:
        Adapters.start(model, AdapterConfig(rank=4, alpha=8.0), seed=0)
    return model


def numbers(log):
    return {key: value for key, value in log.items() if "second" not in key and "mb" not in key}


@pytest.mark.parametrize(("kind", "reference"), [(kind, name) for kind in POLICIES for name in VALID[kind]])
def test_a_valid_reference_is_the_policy_that_the_run_started_from(kind, reference):
    trainer = make_trainer(model=model_of(kind), reference=reference)
    assert type(trainer.reference) is VALID[kind][reference]
    start, before = copy.deepcopy(trainer.policy), weights_of(trainer)
    first, second = trainer.step(), trainer.step()
    assert abs(first["kl"]) < 1e-4 < abs(second["kl"])
    changed = {name for name, weight in trainer.policy.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name, _ in trainer.policy.stored()} and changed
    assert all(any(part in name for part in NEW[kind]) for name in changed)
    if kind == "full":
        assert changed == before.keys()
    if kind == "lora_top":
        assert not any(".layers.0." in name or ".layers.1." in name for name in changed)
    for batch in trainer.collect().batches(torch.arange(16), microbatch=4):
        expected = start(batch, ("logprobs",)).logprobs
        assert torch.equal(trainer.reference.logprobs(batch, temperature=1.0), expected)
        assert not torch.equal(trainer.policy(batch, ("logprobs",)).logprobs, expected)


@pytest.mark.parametrize(("kind", "reference"), REFUSED)
def test_an_invalid_reference_is_refused_by_name(kind, reference):
    with pytest.raises(ValueError, match=REFUSED[kind, reference]):
        make_trainer(model=model_of(kind), reference=reference)


def test_every_pair_is_valid_or_refused():
    assert {(kind, name) for kind in POLICIES for name in VALID[kind] if name != "auto"} | REFUSED.keys() == {
        (kind, name) for kind in POLICIES for name in ("adapter_off", "hydra", "frozen_copy")
    }


@pytest.mark.parametrize("kind", ["top", "lora_top"])
def test_after_ten_updates_hydra_has_the_bits_of_a_copy_of_the_starting_policy(kind):
    trainer = make_trainer(model=model_of(kind), reference="hydra", updates=10)
    start = FrozenCopy(trainer.policy)
    for _ in range(10):
        log = trainer.step()
    assert abs(log["kl"]) > 1e-3
    rollout = trainer.collect()
    shared = rollout.starting_from(trainer.reference, 4)
    for plain, stored in zip(*(one.batches(torch.arange(16), 4) for one in (rollout, shared)), strict=True):
        expected = start.logprobs(plain, temperature=1.0)
        assert torch.equal(trainer.reference.logprobs(plain, temperature=1.0), expected)
        assert torch.equal(trainer.reference.logprobs(stored, temperature=1.0), expected)


# ---- the frozen layers run once ----


def calls_after_sampling(trainer):
    """Return the numbers of tokens in the passes of the first layer that one update makes after sampling."""
    counted, collect = [], trainer.collect

    def collected():
        rollout = collect()
        counted.clear()
        return rollout

    trainer.collect = collected
    handle = trainer.policy.trunk.layers[0].register_forward_hook(
        lambda m, i, output: counted.append(output[..., 0].numel())
    )
    try:
        trainer.step()
    finally:
        handle.remove()
    return counted


@pytest.mark.parametrize("old", ["sampled", "rescored"])
@pytest.mark.parametrize("kind", ["top", "lora_top"])
def test_the_frozen_layers_run_once_per_rollout(kind, old):
    """One pass for each of the 4 micro-batches of scoring, and none in the 2 epochs of 4 micro-batches."""
    settings = {
        "old_logprobs": old,
        "ppo_epochs": 2,
        "old_kl_target": 0.1,
        "objective": "kl_penalty",
        "old_kl_coef": 0.1,
    }
    trainer = make_trainer(model=model_of(kind), reference="hydra", **settings)
    counted = calls_after_sampling(trainer)
    assert len(counted) == 4
    whole = make_trainer(model=model_of(kind), reference="frozen_copy", **settings)
    again = 4 if old == "rescored" else 1  # rescoring, or the check of a few sequences
    assert len(calls_after_sampling(whole)) == 2 * 4 + again + 4  # and the KL to the old policy


def test_pretraining_text_runs_through_all_layers():
    stream = PretrainStream(torch.randint(3, VOCABULARY, (40, 12), generator=torch.Generator().manual_seed(1)), 0)
    trainer = make_trainer(model=model_of("top"), reference="hydra", pretrain=stream, ptx_coef=0.5)
    assert len(calls_after_sampling(trainer)) == 4 + 8


# ---- the numbers of a run ----


@pytest.mark.parametrize("kind", ["top", "lora_top"])
def test_a_run_with_hydra_has_the_numbers_of_one_with_a_frozen_copy(kind):
    """With one micro-batch per rollout the shapes are the same in all passes, so the bits are."""
    whole = {"microbatch": 16, "minibatch": 16, "ppo_epochs": 3}
    rollout = RolloutConfig(max_prompt_tokens=8, max_response_tokens=10, batch_size=16, check_sequences=16)
    logs = []
    for name in ("hydra", "frozen_copy"):
        trainer = make_trainer(model=model_of(kind), reference=name, rollout=rollout, **whole)
        logs.append([numbers(trainer.step()) for _ in "12"] + [weights_of(trainer)])
    assert logs[0][:2] == logs[1][:2]
    assert all(torch.equal(weight, logs[1][2][name]) for name, weight in logs[0][2].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_paddings_change_a_run_by_rounding_only(dtype):
    logs = []
    for name in ("hydra", "frozen_copy"):
        trainer = make_trainer(model=model_of("top", dtype), reference=name)
        logs.append(numbers(trainer.step()))
    allowed = {torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    for key, value in logs[1].items():
        assert logs[0][key] == pytest.approx(value, rel=allowed, abs=allowed), key


def test_states_are_in_the_dtype_of_the_residual_stream():
    for dtype in (torch.float32, torch.bfloat16):
        trainer = make_trainer(model=model_of("top", dtype), reference="hydra")
        scored, _ = trainer.score(trainer.collect())
        assert scored.rollout.states.dtype == dtype
        assert scored.rollout.states.shape == (int(scored.rollout.input_lengths.sum()), 32)


def test_scores_that_are_skipped_leave_their_states_out():
    def reward(rollout):
        return torch.where(torch.arange(len(rollout)) % 3 == 1, torch.nan, 1.0 * rollout.response_lengths)

    trainer = make_trainer(model=model_of("top"), reference="hydra", reward=reward, nonfinite_scores="skip")
    scored, _ = trainer.score(trainer.collect())
    assert len(scored.rollout.states) == int(scored.rollout.input_lengths.sum())
    trainer = make_trainer(model=model_of("top"), reference="hydra", reward=reward, nonfinite_scores="skip")
    assert trainer.step()["scores_skipped"] > 0


def test_trpo_steps_the_top_layers_within_its_bound():
    model = model_of("top")
    trainer = make_trainer(model=model, reference="hydra", objective="trpo", attention="eager", entropy_coef=0.0)
    before = weights_of(trainer)
    log = trainer.step()
    assert 0 < log["trpo_kl"] <= trainer.config.trpo.max_kl and log["trpo_gain"] > 0
    changed = {name for name, weight in trainer.policy.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name, _ in trainer.policy.stored()}


def test_a_value_function_with_its_own_trunk_reads_the_tokens():
    model = model_of("top")
    value = RewardModel.from_causal_lm(tiny(initializer_range=0.1, num_hidden_layers=3), 4)
    trainer = make_trainer(model=model, value_model=value, reference="hydra")
    before = weights_of(trainer)
    trainer.step()
    changed = {name for name, weight in trainer.policy.named_parameters() if not torch.equal(weight, before[name])}
    assert {name for name in before if name.startswith("value.")} <= changed
    assert isinstance(trainer.policy, ActorCritic)


@pytest.mark.parametrize("state", ["resident", "host"])
def test_the_optimizer_and_the_average_hold_what_is_trained(state):
    memory = MemoryConfig(optimizer_state=state)
    trainer = make_trainer(model=model_of("top"), reference="hydra", memory=memory, ema_decay=0.5)
    trainer.step()
    stored = dict(trainer.policy.stored())
    stepped = {id(p) for group in trainer.update_rule.optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in stored.values()}
    average = dict(trainer.update_rule.average.model.named_parameters())
    for name, weight in trainer.policy.named_parameters():
        assert (average[name] is weight) == (name not in stored)
        if name in stored:
            assert not torch.equal(average[name], weight)


def test_states_of_an_experience_are_those_of_its_tokens():
    trainer = make_trainer(model=model_of("top"), reference="hydra")
    scored, _ = trainer.score(trainer.collect())
    for batch in scored.rollout.batches(torch.arange(16), 5):
        expected = trainer.policy.states_below(replace(batch, states=None))
        torch.testing.assert_close(batch.states[batch.real], expected[batch.real], rtol=0, atol=2e-6)
