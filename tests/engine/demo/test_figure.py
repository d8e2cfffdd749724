"""`rlhf figure --quick`: everything is trained, judged, written and resumed."""

import json
from pathlib import Path

import pytest

from rlhf_engine.config import load_config
from rlhf_engine.demo import figure, run
from rlhf_engine.demo.config import DemoRunConfig, FigureConfig
from rlhf_engine.demo.figure import CONTESTANTS, few_shot_prefix, run_figure
from rlhf_engine.demo.run import CONFIG, with_shipped_data
from tests.engine.helpers.cli_run import read_lines, rlhf
from tests.engine.helpers.demo_data import with_few_examples


@pytest.fixture(scope="module")
def figure_run(tmp_path_factory):
    """Run a quick figure that is interrupted after the first size and resumed; return its folder, its table and both logs."""
    root, logs = tmp_path_factory.mktemp("figure"), ([], [])
    real = figure.make_base

    def interrupt(config):
        if config.demo.hidden_size == 32:
            raise KeyboardInterrupt
        return real(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "with_shipped_data", with_few_examples)
        with patch.context() as broken:
            broken.setattr(figure, "make_base", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run_figure(root, 3, quick=True, say=logs[0].append)
        yield root, run_figure(root, 3, quick=True, say=logs[1].append), logs


def test_s20_the_figure_has_every_contestant_at_every_size(figure_run):
    root, table, _ = figure_run
    numbers = json.loads((root / "figure.json").read_text())
    assert list(numbers["contestants"]) == list(CONTESTANTS) and numbers["seed"] == 3
    for name, sizes in numbers["contestants"].items():
        assert [one["width"] for one in sizes] == [16, 32]
        assert sizes[0]["parameters"] < sizes[1]["parameters"]
        assert all(0 <= one["win_rate"]["low"] <= one["win_rate"]["rate"] <= 1 for one in sizes)
        assert all(one["win_rate"]["prompts"] == 12 and one["perplexity"] > 1 for one in sizes)
        assert f"| {name} | " in table
    assert (root / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (root / "figure.md").read_text() == table + "\n"
    of = {name: sizes[1]["perplexity"] for name, sizes in numbers["contestants"].items()}
    assert of["base"] == of["base, prompted"] and len(set(of.values())) == 4


def test_s20_the_figure_resumes_size_by_size(figure_run):
    root, table, (first, second) = figure_run
    assert any(line.startswith("16: PPO-ptx: ") for line in first) and first[-1] == "32: train pretrain ..."
    assert second[0] == "32: train pretrain ..." and not [line for line in second if line.startswith("16")]
    again = []
    assert run_figure(root, 3, quick=True, say=again.append) == table and again == []


def test_s9_the_figures_ppo_ptx_does_not_train_on_the_text_of_perplexity(figure_run):
    root, _, _ = figure_run
    held_out, rest = ((root / name).read_text().split("\n\n") for name in ("held_out.txt", "pretrain.txt"))
    whole = (figure.DATA / "pretrain.txt").read_text().strip().split("\n\n")
    assert [*held_out[:-1], held_out[-1].strip(), *rest[:-1], rest[-1].strip()] == whole
    config = load_config(root / "width_32" / "ptx" / "ppo" / "config.yaml")
    assert config.ppo.ptx_coef == FigureConfig().ptx_coef > 0 and config.data.pretrain == str(root / "pretrain.txt")
    assert load_config(root / "width_32" / "ppo" / "config.yaml").ppo.ptx_coef == 0.0


def test_s20_few_shot_examples_are_demonstrations_in_the_format_of_a_prompt(tmp_path):
    config = with_shipped_data(load_config(CONFIG, kind=DemoRunConfig), tmp_path, 0)
    shots = few_shot_prefix(config)
    parts = shots.removesuffix("\n\n").split("\n\n")
    assert len(parts) == 3 and shots.endswith("\n\n")
    demonstrations = {(given["prompt"], given["response"]) for given in read_lines(Path(config.data.demonstrations))}
    assert all(tuple(part.split("\n")) in demonstrations for part in parts)
    assert few_shot_prefix(with_shipped_data(load_config(CONFIG, kind=DemoRunConfig), tmp_path, 1)) != shots


@pytest.mark.parametrize("command", ["demo", "figure"])
@pytest.mark.parametrize(
    "override",
    [
        *("seed=1", "output_dir=x", "data.prompts=x", "data.demonstrations=x", "data.comparisons=x"),
        *("model.path=x", "reward.path=x", "reward.function=x:y", "model={path: x}"),
    ],
)
def test_overrides_of_settings_that_demo_and_figure_decide_are_refused(
    tmp_path, capsys, monkeypatch, command, override
):
    monkeypatch.setattr(run, "make_base", None)
    code, _, shown = rlhf(capsys, command, "--output", tmp_path / "f", sets=[override])
    assert (
        code == 2
        and f"override {override!r} is not possible: the {command}, by its options --seed and --output" in shown
    )
    assert not (tmp_path / "f").exists()


def test_s20_overrides_of_settings_that_the_figure_decides_are_refused(tmp_path, capsys):
    code, _, shown = rlhf(capsys, "figure", "--output", tmp_path / "f", sets=["demo.hidden_size=8"])
    assert code == 2 and "override 'demo.hidden_size=8' is not possible: the figure, by its options" in shown
    code, _, shown = rlhf(capsys, "figure", "--output", tmp_path / "f", sets=["ppo.ptx_coef=2"])
    assert code == 2 and "section figure, sets ppo.ptx_coef" in shown
    code, _, shown = rlhf(capsys, "figure", "--output", tmp_path / "f", sets=["figure.widths=[48]"])
    assert code == 2 and "widths: got 48, expected a multiple of head_size 32" in shown
    assert not (tmp_path / "f").exists()
