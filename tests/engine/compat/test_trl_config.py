"""The fields of `PPOConfig`: TRL's names and defaults, and what is refused."""

from dataclasses import MISSING, fields

import pytest
from transformers import HfArgumentParser

from rlhf_engine.compat.trl import PPOConfig

WRONG = {
    "num_ppo_epoch": (3, TypeError, "unknown field 'num_ppo_epoch'; did you mean 'num_ppo_epochs'"),
    "quite_unknown_setting": (1, TypeError, "unknown field 'quite_unknown_setting'$"),
    "max_grad_norm": (
        0.5,
        ValueError,
        "max_grad_norm: got 0.5, which is not supported, expected 1.0; TRL's PPOTrainer does not",
    ),
    "torch_compile": (True, ValueError, "torch_compile: got True, which is not supported, expected False"),
    "max_steps": (10, ValueError, "max_steps: got 10, .* set total_episodes"),
    "push_to_hub": (True, ValueError, "push_to_hub: got True"),
    "dataloader_drop_last": ("x", ValueError, "dataloader_drop_last: got 'x'"),
    "batch_size": (8, ValueError, "batch_size: got 8; PPOTrainer computes it"),
    "temperature": (0.0, ValueError, "temperature: got 0.0, expected above 0"),
    "gamma": (1.5, ValueError, "gamma: got 1.5, expected 0 to 1"),
    "vf_coef": (-1.0, ValueError, "vf_coef: got -1.0, expected at least 0"),
    "response_length": (0, ValueError, "response_length: got 0, expected a whole number of at least 1"),
    "kl_estimator": ("k2", ValueError, "kl_estimator: got 'k2', expected one of 'k1', 'k3'"),
    "stop_token": ("eos!", ValueError, "stop_token: got 'eos!'"),
    "optim": ("adafactor", ValueError, "optim: got 'adafactor', expected one of 'adamw_torch'"),
    "save_strategy": ("epoch", ValueError, "save_strategy: got 'epoch'"),
    "lr_scheduler_type": (
        "reduce_lr_on_plateau",
        ValueError,
        "lr_scheduler_type: got 'reduce_lr_on_plateau', expected one that reads no",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named(tmp_path, name):
    value, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_two_stop_tokens_are_refused(tmp_path):
    with pytest.raises(ValueError, match="stop_token and stop_token_id are both set"):
        PPOConfig(output_dir=str(tmp_path), use_cpu=True, stop_token="eos", stop_token_id=3)


def test_settings_that_are_off_or_describe_the_trainer_are_accepted(tmp_path):
    made = PPOConfig(
        str(tmp_path),
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        ddp_find_unused_parameters=False,
    )
    assert made.bf16 and made.gradient_checkpointing and made.optimizer_state == "resident"
    assert PPOConfig(str(tmp_path), use_cpu=True, optim="adamw_torch_8bit").optimizer_state == "8bit"


def test_the_command_line_of_a_script(tmp_path):
    line = (
        f"--output_dir {tmp_path} --use_cpu --total_episodes 10 --stop_token eos --bf16 False --missing_eos_penalty 1.0"
    )
    (made,) = HfArgumentParser((PPOConfig,)).parse_args_into_dataclasses(line.split())
    assert (made.total_episodes, made.stop_token, made.bf16, made.missing_eos_penalty) == (10, "eos", False, 1.0)


def test_fields_and_defaults_are_those_of_trl():
    theirs = pytest.importorskip(
        "trl.experimental.ppo", reason="needs trl 1.12, the last release with PPOTrainer"
    ).PPOConfig

    def defaults(config):
        made = {one.name: (one.default, one.default_factory) for one in fields(config)}
        return {name: default if default is not MISSING else factory() for name, (default, factory) in made.items()}

    assert defaults(PPOConfig) == defaults(theirs)
