"""The tables of InstructGPT's rows and of implementation details: commands run, tests exist, defaults match the code."""

import re
import shlex
from pathlib import Path

import pytest

from rlhf_engine.cli import main
from rlhf_engine.config import RunConfig, load_config
from tests.engine.helpers.cli_run import new_model, new_run

DESIGN = Path(__file__).parents[2] / "docs" / "design"
SMALL = (
    "sft.epochs=1 ppo.updates=1 ppo.rollout_batch=4 ppo.minibatch=2 ppo.microbatch=2 "
    "rollout.max_response_tokens=6 rollout.max_prompt_tokens=8"
)

TABLE = (DESIGN / "instructgpt_rows.md").read_text()
ROWS = {row: cells for row, cells in re.findall(r"^\| (S\d+) \| (.*) \|$", TABLE, re.M)}
COMMANDS = sorted({command for cells in ROWS.values() for command in re.findall(r"`(rlhf [^`]+)`", cells)})


def test_every_row_has_a_command_and_tests():
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert list(ROWS) == [f"S{number}" for number in range(1, 23)]
    for row, cells in ROWS.items():
        assert f"`test_{row.lower()}_*`" in cells and re.search(rf"^def test_{row.lower()}_", tests, re.M), row
        assert "`rlhf " in cells, row


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Create a user's folder: a base model, data files, two reward models, a text, a judge."""
    folder = tmp_path_factory.mktemp("rows")
    new_run(folder, new_model(folder / "base"))
    new_model(folder / "small", 1, hidden_size=16, head_dim=4, num_hidden_layers=1)
    (folder / "text.txt").write_text("yes or no\n\nmaybe so\n\n" * 40)
    (folder / "judge.py").write_text("def longer(prompts, a, b):\n    return list(map(len, a)), list(map(len, b))\n")
    for model, output in (("base", "runs/own"), ("small", "runs/smaller")):
        with pytest.raises(SystemExit) as end:
            main(
                [
                    "rm",
                    "--config",
                    str(folder / "run.yaml"),
                    *sets(f"model.path={folder / model}", f"output_dir={folder / output}"),
                ]
            )
        assert not end.value.code
    return folder


def sets(*overrides):
    return [part for override in overrides for part in ("--set", override)]


OPTIONS = {
    "sft": [],
    "rm": [],
    "ppo": sets("reward.path=runs/own/rm"),
    "eval": sets("eval.candidate=base", "eval.baseline=base", "eval.judge=runs/own/rm"),
    "iterate": sets(
        *("iterate.judge=judge.py:longer", "iterate.rounds=1", "iterate.prompts=6", "iterate.completions=3"),
        *("eval.judge=judge.py:longer", "rollout.max_response_tokens=6"),
    ),
}
"""Options that a command needs in addition to a config."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_rows_runs(command, place, tmp_path, capsys, monkeypatch):
    """`rlhf figure` trains for minutes and has separate tests; this test checks only its name and its options."""
    monkeypatch.chdir(place)
    name, *rest = shlex.split(command.replace("SMALLER", "runs/smaller/rm"))[1:]
    if name == "figure":
        arguments = [name, *rest, "--help"]
    elif name == "data":
        arguments = [name, *rest, "--in", "prompts.jsonl", "--out", str(tmp_path / "clean")]
    else:
        out = sets(f"output_dir={tmp_path}", f"model.path={place / 'base'}", *SMALL.split())
        arguments = [name, "--config", "run.yaml", *out, *OPTIONS[name], *rest]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code, capsys.readouterr().err


DETAILS = (DESIGN / "implementation_details.md").read_text()


def test_defaults_match_the_table_of_implementation_details():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", DETAILS, re.M)[1:]
    assert len(rows) == 21 and all(why.strip() for *_, why in rows)
    options = re.findall(r"`([a-z_.]+)` (\[[^\]]*\]|[\w.-]+)", "; ".join(cell for _, cell, _ in rows))
    assert len(options) > 30
    for key, value in options:
        assert load_config(None, [f"{key}={value}"]) == RunConfig(), (key, value)
