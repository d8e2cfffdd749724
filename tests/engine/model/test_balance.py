"""The balancing loss of experts: the gradient of transformers' own loss, a setting that turns it off, and a metric."""

import copy
import logging
import sys

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from benchmarks.families.checks import PROMPTS, RESPONSE, a_rollout, generator_of, prompts
from benchmarks.families.configs import FAMILIES, build
from rlhf_engine.config import OptimConfig, PPOConfig, RolloutConfig, RunConfig, SFTConfig
from rlhf_engine.data import Example
from rlhf_engine.model import ActorCritic, LanguageModel, balance
from rlhf_engine.ppo.build import build_trainer
from rlhf_engine.supervised.sft import SFTTrainer

MIXTURES = (
    "dbrx",
    "ernie4_5_moe",
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid_moe",
    "granitemoeshared",
    "jamba",
    "jetmoe",
    "minimax",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
)
OTHERS = {
    "doge": "dense",
    "doge_moe": "refused, because its router mixes tokens",
    "gpt_oss_yarn": "experts of gpt_oss",
    "granitemoehybrid": "dense",
    "phimoe_longrope": "experts of phimoe",
}
"""Families whose module in transformers has a balancing loss, and why they are not in MIXTURES."""
EXAMPLES = [Example(tuple(range(3, 11)), tuple(range(20, 28))), Example((5, 9, 33), (44, 7, 60, 61))]


def mixture(family, coef=0.5, on=True):
    named = {
        "dbrx": {"ffn_config": {**FAMILIES["dbrx"][1]["ffn_config"], "moe_loss_weight": coef}},
        "jetmoe": {"aux_loss_coef": coef},
    }
    return build(family, output_router_logits=on, **named.get(family, {"router_aux_loss_coef": coef}))


def trainer_of(model, *, with_balance=True, log=None, **settings):
    actor = LanguageModel(model)
    if not with_balance:
        actor.balance = None
    config = SFTConfig(batch_size=2, epochs=1, **settings)
    return SFTTrainer(actor, EXAMPLES, EXAMPLES, config, pad_id=0, seed=0, log=log)


def of_transformers(model):
    """Return the loss of transformers on the padded examples and its gradients; labels are the response tokens."""
    rows = [(*one.prompt, *one.response) for one in EXAMPLES]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for index, (one, row) in enumerate(zip(EXAMPLES, rows, strict=True)):
        labels[index, len(one.prompt) : len(row)] = ids[index, len(one.prompt) : len(row)]
    found = model(input_ids=ids, attention_mask=mask, labels=labels)
    found.loss.backward()
    return found, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("family", MIXTURES)
def test_sft_has_the_gradient_of_transformers(family):
    model, logged = mixture(family), []
    found, expected = of_transformers(copy.deepcopy(model))
    trainer = trainer_of(model, log=lambda step, metrics: logged.append(metrics))
    loss = trainer.backward([0, 1], trainer.passes.size)
    assert loss + trainer.step_metrics["router_aux_loss"] == pytest.approx(float(found.loss), rel=1e-5)
    assert trainer.step_metrics["router_aux_loss"] == pytest.approx(0.5 * float(found.aux_loss), rel=1e-5)
    gradients = {name: one.grad for name, one in model.named_parameters()}
    for name, one in expected.items():
        torch.testing.assert_close(gradients[name], one, rtol=1e-3, atol=1e-5, msg=name)


def test_the_term_matters_and_can_be_turned_off():
    with_it, without, plain = mixture("mixtral"), mixture("mixtral"), mixture("mixtral", on=False)
    trainers = [trainer_of(with_it), trainer_of(without, with_balance=False), trainer_of(plain)]
    losses = [trainer.backward([0, 1], trainer.passes.size) for trainer in trainers]
    assert losses == pytest.approx([losses[0]] * 3)
    routers = [
        next(p.grad for n, p in m.named_parameters() if n.endswith("gate.weight")) for m in (with_it, without, plain)
    ]
    assert torch.equal(routers[1], routers[2]) and (routers[0] - routers[1]).abs().max() > 1e-3
    assert [bool(trainer.step_metrics) for trainer in trainers] == [True, False, False]


def test_every_family_with_a_balancing_loss_is_compared():
    modules = {
        family: sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[getattr(transformers, kind)].__module__]
        for family, (kind, _) in FAMILIES.items()
    }
    having = {family for family, module in modules.items() if hasattr(module, "load_balancing_loss_func")}
    assert having == {*MIXTURES, *OTHERS}


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "glm4_moe"])
def test_models_without_the_term_in_transformers_have_none(family, caplog):
    with caplog.at_level(logging.WARNING):
        assert ActorCritic(build(family)).balance is None
        assert not caplog.text
        assert ActorCritic(build(family, output_router_logits=True)).balance is None
    assert "output_router_logits is true" in caplog.text and type(build(family)).__name__ in caplog.text


def test_a_coefficient_of_zero_turns_it_off():
    assert ActorCritic(mixture("jetmoe", coef=0.0)).balance is None


@pytest.mark.parametrize("names", ["_COEFFICIENT", "_CHOSEN"])
def test_a_loss_whose_numbers_have_unknown_names_is_refused(names, monkeypatch):
    monkeypatch.setattr(balance, names, ("unknown_name",))
    with pytest.raises(ValueError, match=r"the config of MixtralForCausalLM asks for the .*needs unknown_name"):
        ActorCritic(mixture("mixtral"))


def test_a_z_loss_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        ActorCritic(build("bamba"))
        assert not caplog.text
        ActorCritic(build("bamba", z_loss_coefficient=0.1))
    assert "BambaForCausalLM: z_loss_coefficient is 0.1" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_counts_real_tokens_and_agrees_with_gradient_checkpointing(checkpointing):
    policy = ActorCritic(mixture("qwen3_moe"), gradient_checkpointing=checkpointing)
    rollout = a_rollout(policy)
    found = policy(rollout.batch(torch.arange(4)), ("balance",)).balance
    rows = [torch.tensor([*p, *r][:-1]) for p, r in zip(rollout.prompts(), rollout.responses(), strict=True)]
    mask = torch.arange(max(PROMPTS) + RESPONSE - 1) < torch.tensor([len(row) for row in rows])[:, None]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    own = mixture("qwen3_moe")
    expected = 0.5 * own(input_ids=ids, attention_mask=mask.long(), use_cache=False).aux_loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found.backward()
    expected.backward()
    name = "layers.0.mlp.gate.weight"
    torch.testing.assert_close(
        policy.trunk.get_parameter(name).grad, own.model.get_parameter(name).grad, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("with_balance", [True, False])
def test_ppo_adds_it_and_logs_it(with_balance):
    policy = ActorCritic(mixture("olmoe"))
    if not with_balance:
        policy.balance = None
    ppo = PPOConfig(updates=1, rollout_batch=4, minibatch=4, microbatch=2, optim=OptimConfig(lr=1e-3))
    rollout = RolloutConfig(max_prompt_tokens=max(PROMPTS), max_response_tokens=RESPONSE, batch_size=4)
    trainer = build_trainer(
        policy,
        None,
        lambda sampled: sampled.response_lengths.float(),
        prompts(),
        RunConfig(seed=0, ppo=ppo, rollout=rollout),
        generator=generator_of(policy),
    )
    log = trainer.step()
    assert ("router_aux_loss" in log) == with_balance
    if with_balance:
        assert 0.5 * 2 <= log["router_aux_loss"] < 0.5 * 4  # top 2 of 4 experts: 2 if balanced
