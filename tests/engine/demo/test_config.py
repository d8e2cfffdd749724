"""The sections `demo` and `figure`: which commands read them, and how other commands treat them in a config file."""

from dataclasses import replace

import pytest
import yaml

from rlhf_engine.checkpoint import check_settings
from rlhf_engine.config import PPOConfig, RunConfig, load_config, load_saved_config, save_config
from rlhf_engine.demo.config import DemoConfig, DemoRunConfig
from tests.engine.helpers.cli_run import rlhf


def test_a_run_config_with_the_demo_is_loaded_with_its_class(tmp_path):
    original = DemoRunConfig(seed=3, demo=DemoConfig(layers=5))
    save_config(original, tmp_path / "run.yaml")
    found = load_config(tmp_path / "run.yaml", ["figure.shots=2"], kind=DemoRunConfig)
    assert type(found) is DemoRunConfig and found == replace(original, figure=replace(original.figure, shots=2))
    assert type(found.without_demo()) is RunConfig and found.without_demo() == RunConfig(seed=3)


@pytest.mark.parametrize(("section", "key"), [("demo", "samples"), ("figure", "shots")])
def test_other_commands_refuse_the_sections_of_the_demo(tmp_path, capsys, section, key):
    path = tmp_path / "run.yaml"
    path.write_text(f"{section}: {{{key}: 2}}")
    words = f"{section}: this section belongs to `rlhf demo` and `rlhf figure`, and this command does not read it; remove it"
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: {words}"
    with pytest.raises(ValueError, match=f"^{section}.{key}=3: {section}: this section belongs to"):
        load_config(None, [f"{section}.{key}=3"])
    code, _, shown = rlhf(capsys, "ppo", "--config", path)
    assert code == 2 and shown == f"rlhf: {path}: {words}\n"


def test_a_checkpoint_that_was_saved_with_the_demo_still_resumes(tmp_path):
    """Earlier versions, in which RunConfig had the two sections, saved them with every run."""
    saved = DemoRunConfig(seed=3, ppo=PPOConfig(kl_coef=0.5)).to_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert load_saved_config(tmp_path / "config.yaml") == RunConfig(seed=3, ppo=PPOConfig(kl_coef=0.5))
    check_settings(tmp_path, RunConfig(seed=3, ppo=PPOConfig(kl_coef=0.5)))
    with pytest.raises(ValueError, match=r"ppo\.kl_coef: got 0\.1, expected 0\.5"):
        check_settings(tmp_path, RunConfig(seed=3, ppo=PPOConfig(kl_coef=0.1)))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved | {"seed": -1}))
    with pytest.raises(ValueError, match=r"config\.yaml: seed: got -1"):
        load_saved_config(tmp_path / "config.yaml")
