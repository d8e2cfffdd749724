"""Suggestions for unknown keys, among all sections and the names that other trainers use."""

import pytest

from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.config.hints import ALIASES, suggestions
from rlhf_engine.demo.config import DemoRunConfig

KEYS = RunConfig.keys()


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("sft.lr", "'sft.optim.lr'"),
        ("ppo.lr", "'ppo.optim.lr'"),
        ("learning_rate", "'sft.optim.lr', 'reward.optim.lr' or 'ppo.optim.lr'"),
        ("ppo.optim.learning_rate", "'ppo.optim.lr'"),
        ("ppo.beta", "'ppo.kl_coef'"),
        ("kl_coef", "'ppo.kl_coef'"),
        ("rollout.kl_coeff", "'ppo.kl_coef'"),
        ("ppo.batch_size", "'ppo.rollout_batch'"),
        ("rollout.max_new_tokens", "'rollout.max_response_tokens'"),
        ("max_new_tokens", "'rollout.max_response_tokens'"),
        ("ppo.max_new_tokens", "'rollout.max_response_tokens'"),
        ("sft.num_train_epochs", "'sft.epochs'"),
        ("ppo.epochs", "'ppo.ppo_epochs'"),
        ("ppo.max-grad-norm", "'ppo.optim.max_grad_norm'"),
        ("Temperature", "'rollout.temperature'"),
        ("model_name_or_path", "'model.path'"),
        ("gradient_checkpointing", "'memory.gradient_checkpointing'"),
        ("sft.epoch", "'sft.epochs'"),
        ("ppo.trpo.maxkl", "'ppo.trpo.max_kl'"),
        ("ppoo", "'ppo'"),
        ("gae_lamda", "'ppo.lam'"),
        ("ppo.vf_coeff", "'ppo.vf_coef'"),
        ("bf16", "'dtype'"),
    ],
)
def test_a_key_that_people_type_gets_the_right_hint(typed, meant):
    with pytest.raises(ValueError, match=rf"unknown key '{typed}'; did you mean {meant}\?$"):
        load_config(None, [f"{typed}=1"])


def test_a_key_like_no_other_gets_no_wrong_hint():
    with pytest.raises(ValueError, match=r"unknown key 'ppo.zzz'; `rlhf config show ppo` lists the keys$"):
        load_config(None, ["ppo.zzz=1"])
    with pytest.raises(ValueError, match=r"unknown key 'zzz'; `rlhf config show` lists the keys$"):
        RunConfig.from_dict({"zzz": 1})


def test_every_alias_leads_to_a_key_that_exists():
    assert not [key for keys in ALIASES.values() for key in keys if key not in KEYS]
    assert all(suggestions(name, KEYS) for name in ALIASES)


def test_every_key_with_one_letter_missing_leads_back_to_it():
    """A key of the same name in the same section is suggested first."""
    wrong = []
    for key in KEYS:
        name = key.split(".")[-1]
        if len(name) > 5:
            typed = key.removesuffix(name) + name[:3] + name[4:]
            if suggestions(typed, KEYS) != [key]:
                wrong.append((typed, suggestions(typed, KEYS)))
    assert not wrong


def test_sections_of_the_demo_are_suggested_where_they_exist():
    with pytest.raises(ValueError, match=r"unknown key 'demo.hidden'; did you mean 'demo.hidden_size'\?"):
        load_config(None, ["demo.hidden=3"], kind=DemoRunConfig)
