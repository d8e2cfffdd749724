"""`rlhf config show`: every field with its description, as YAML that reads back."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

import rlhf_engine
from rlhf_engine.cli import main
from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.config.describe import field_docs
from rlhf_engine.demo.config import DemoRunConfig

SHIPPED = [Path(rlhf_engine.__path__[0]) / name for name in ("demo/demo.yaml", "examples/one_gpu_7b.yaml")]


def show(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["config", "show", *map(str, arguments)])
    shown = capsys.readouterr()
    return exit_.value.code or 0, shown.out, shown.err


def sections(kind=RunConfig):
    """Yield every section of the config, nested sections included."""
    yield kind
    for item in fields(kind):
        hint = get_type_hints(kind)[item.name]
        if is_dataclass(hint):
            yield from sections(hint)


def test_every_field_of_every_section_has_a_docstring():
    for section in sections(DemoRunConfig):
        assert set(field_docs(section)) == {item.name for item in fields(section)}, section.__name__


def test_the_output_reads_back_to_the_defaults(capsys, tmp_path):
    code, shown, _ = show(capsys)
    (tmp_path / "all.yaml").write_text(shown)
    assert code == 0 and load_config(tmp_path / "all.yaml") == RunConfig()
    for section in sections():
        for words in field_docs(section).values():
            assert words.split(" ")[0] in shown


def test_a_field_is_shown_with_docstring_type_and_default(capsys):
    _, shown, _ = show(capsys, "ppo.optim", "--set", "ppo.optim.lr=0.5")
    lines = shown.splitlines()
    assert lines[0].startswith("# Peak learning rate; AdamW changes a weight by about this much per step.")
    # The default of PPO's optimizer, which is not that of OptimConfig.
    assert "(float above 0 and at most 1; default 9.0e-06)" in " ".join(lines[:3]).replace(" # ", " ")
    assert yaml.safe_load(shown)["lr"] == 0.5


def test_none_is_shown_as_null(capsys):
    _, shown, _ = show(capsys)
    assert "None" not in shown


def test_an_unknown_section_is_refused(capsys):
    code, _, shown = show(capsys, "ppo.optin")
    assert code == 2 and shown == "rlhf: unknown key 'ppo.optin'; did you mean 'ppo.optim'?\n"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_example_configs_load(capsys, path):
    code, shown, _ = show(capsys, "--config", path)
    assert code == 0 and yaml.safe_load(shown) == load_config(path, kind=DemoRunConfig).without_demo().to_dict()


@pytest.mark.parametrize("section", ["demo", "figure"])
def test_the_sections_of_the_demo_are_shown_by_name_only(capsys, section):
    _, shown, _ = show(capsys)
    assert not {"demo", "figure"} & yaml.safe_load(shown).keys()
    code, shown, _ = show(capsys, section, "--set", f"{section}.samples=7")
    expected = getattr(DemoRunConfig(), section).to_dict() | {"samples": 7}
    assert code == 0 and yaml.safe_load(shown) == expected and "default 16" in show(capsys, "demo")[1]


def test_one_setting_is_shown_with_its_description(capsys, tmp_path):
    code, shown, _ = show(capsys, "ppo.kl_coef", "--set", "ppo.kl_coef=0.5")
    assert code == 0 and yaml.safe_load(shown) == {"kl_coef": 0.5} and "# beta, the weight of KL" in shown
    assert yaml.safe_load(show(capsys, "ppo.optim.lr")[1]) == {"lr": 9e-6}
    assert yaml.safe_load(show(capsys, "seed")[1]) == {"seed": 0}
    code, _, message = show(capsys, "ppo.kl_coeff")
    assert code == 2 and message == "rlhf: unknown key 'ppo.kl_coeff'; did you mean 'ppo.kl_coef'?\n"


@pytest.mark.parametrize(
    "name, message",
    [
        ("ppo.kl_coef.x", "ppo.kl_coef is a setting, not a section; show it as ppo.kl_coef"),
        ("ppo.zzz", "unknown key 'ppo.zzz'; `rlhf config show ppo` lists the keys"),
        ("zzz.x", "unknown key 'zzz'; `rlhf config show` lists the keys"),
    ],
)
def test_the_error_for_a_name_that_cannot_be_shown_says_what_to_do(capsys, name, message):
    code, _, shown = show(capsys, name)
    assert code == 2 and shown == f"rlhf: {message}\n"
