"""The commands `rlhf ppo`, `sft`, `rm`, `eval` and `demo` that end early, or that find an earlier run."""

import errno
import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from rlhf_engine import files
from rlhf_engine.metrics import MetricsWriter
from rlhf_engine.ppo import update as ppo
from tests.engine.helpers.cli_run import new_run, read_lines, rlhf

REWARD = """
import signal
from pathlib import Path

def reward(prompts, answers):
    calls = Path("calls.txt")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    if len(calls.read_text()) == 4:
        signal.raise_signal(signal.{signal})
    return [float(len(answer)) for answer in answers]
"""
PLAIN = "def reward(prompts, answers):\n    return [float(len(answer)) for answer in answers]\n"


@pytest.fixture
def run(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(PLAIN)
    return new_run(tmp_path, base)


SETS = ["reward.function=rewards.py:reward", "ppo.value_init=zero", "ppo.updates=4", "ppo.score_scale=running"]


def start(capsys, *flags, sets=()):
    return rlhf(capsys, "ppo", "--config", "run.yaml", *flags, sets=[*SETS, *sets])


def updates(folder):
    return json.loads((folder / "trainer.json").read_text())["updates_done"]


def same_end(first, second):
    """Return whether two runs have the same weights and the same scores."""
    weights = [load_file(out / "ppo" / "model.safetensors") for out in (first, second)]
    scores = [
        [(row["step"], row["score_mean"]) for row in read_lines(out / "metrics.jsonl")] for out in (first, second)
    ]
    return scores[0] == scores[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_while_sampling_saves_and_the_message_has_the_command_to_resume(run, capsys, name, code):
    (run / "rewards.py").write_text(REWARD.format(signal=name))
    ended, _, shown = start(capsys)
    assert ended == code and updates(run / "out" / "ppo") == 2
    command = " ".join(f"--set {one}" for one in SETS)
    assert shown == (
        f"rlhf: interrupted by {name}; the checkpoint {run / 'out' / 'ppo'} holds 2 updates, and a resumed run continues from "
        f"there; to continue: rlhf ppo --config run.yaml {command} --resume\n"
    )
    ended, _, shown = start(capsys, "--resume")
    assert ended == 0, shown
    (run / "rewards.py").write_text(PLAIN)
    assert start(capsys, sets=["output_dir=whole"])[0] == 0
    assert same_end(run / "out", run / "whole")


def break_at(monkeypatch, call, action):
    """Call `action` in the backward pass number `call` of the run; an update has two."""
    calls, real = [], ppo.minibatch_backward

    def backward(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            action()
        return real(*arguments, **options)

    monkeypatch.setattr(ppo, "minibatch_backward", backward)


def test_a_signal_after_an_update_s_first_step_lets_it_finish(run, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        break_at(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        ended, _, shown = start(capsys)
    assert ended == 0 and updates(run / "out" / "ppo") == 2 and "holds 2 updates" in shown
    assert start(capsys, "--resume")[0] == 0 and start(capsys, sets=["output_dir=whole"])[0] == 0
    assert same_end(run / "out", run / "whole")


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, KeyboardInterrupt])
def test_an_error_after_an_update_s_first_step_leaves_the_checkpoint(run, capsys, monkeypatch, error):
    def fail():
        raise error("no memory")

    with monkeypatch.context() as patch:
        break_at(patch, 6, fail)
        try:
            shown = start(capsys, sets=["ppo.checkpoint_every=1"])[2]
        except (RuntimeError, AssertionError) as raised:
            shown = raised.__notes__[0]
    assert updates(run / "out" / "ppo") == 2
    assert "update 3 had changed weights and was not finished, so nothing was saved; the checkpoint" in shown
    assert "holds 2 updates, and a resumed run continues from there" in shown
    assert start(capsys, "--resume")[0] == 0 and start(capsys, sets=["output_dir=whole"])[0] == 0
    assert same_end(run / "out", run / "whole")


@pytest.mark.parametrize("error", [OSError, TypeError, AssertionError])
def test_an_error_between_updates_saves_them(run, capsys, monkeypatch, error):
    """The error is raised after a line of metrics is written and before the checkpoint."""
    real = MetricsWriter.write

    def fail(self, step, metrics):
        real(self, step, metrics)
        if step == 3:
            raise error("no line")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_engine.metrics.MetricsWriter.write", fail)
        try:
            shown = start(capsys)[2]
        except (TypeError, AssertionError) as raised:
            shown = raised.__notes__[0]
    assert "holds 3 updates" in shown and updates(run / "out" / "ppo") == 3
    assert start(capsys, "--resume")[0] == 0 and start(capsys, sets=["output_dir=whole"])[0] == 0
    assert same_end(run / "out", run / "whole")


# ---- F4 ----


@pytest.mark.parametrize(
    "command, place", [("sft", "recipes.loading"), ("rm", "recipes.loading"), ("ppo", "checkpoint")]
)
def test_a_finished_run_is_saved_if_its_result_cannot_be_written(run, capsys, monkeypatch, command, place):
    """The disk is full at the last write. A resumed run, with enough space, only writes the result."""
    calls, real = [], files.write_json

    def full(path, content):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    sets = SETS if command == "ppo" else []
    with monkeypatch.context() as patch:
        patch.setattr(f"rlhf_engine.{place}.write_json", full)
        code, _, shown = rlhf(capsys, command, "--config", "run.yaml", sets=sets)
    assert code == 2 and "No space left on device; the checkpoint" in shown and "a resumed run continues" in shown
    assert calls and (command == "ppo" or not (run / "out" / command).exists())
    rows = read_lines(run / "out" / "metrics.jsonl")
    assert rlhf(capsys, command, "--config", "run.yaml", "--resume", sets=sets)[0] == 0
    assert read_lines(run / "out" / "metrics.jsonl") == rows
    assert rlhf(capsys, command, "--config", "run.yaml", sets=[*sets, "output_dir=whole"])[0] == 0
    tensors = [
        {path.name: path.read_bytes() for path in sorted((out / command).glob("*.safetensors"))}
        for out in (run / "out", run / "whole")
    ]
    assert tensors[0] == tensors[1] and tensors[0]


# ---- F5 ----


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", ["sft", "rm", "ppo"])
def test_no_stage_replaces_an_earlier_run_unasked(run, capsys, command):
    """Neither a finished run nor an unfinished one, which has a checkpoint. A resumed finished run does nothing."""
    sets = [*SETS, "ppo.updates=1"] if command == "ppo" else []
    arguments = (command, "--config", "run.yaml")
    assert rlhf(capsys, *arguments, sets=sets)[0] == 0
    before = contents(run / "out")
    code, _, shown = rlhf(capsys, *arguments, sets=sets)
    folder = run / "out" / command
    message = f"{folder}: an earlier run is there; continue it with --resume, or replace it with --overwrite"
    assert code == 2 and shown == f"rlhf: {message}\n"
    assert rlhf(capsys, *arguments, "--resume", sets=sets)[0] == 0 and contents(run / "out") == before
    code, _, shown = rlhf(capsys, *arguments, "--resume", sets=[*sets, "seed=1"])
    assert code == 2 and "seed" in shown  # a finished run with other settings is not resumed
    code, _, shown = rlhf(capsys, *arguments, "--resume", "--overwrite", sets=sets)
    assert code == 2 and "--resume and --overwrite exclude each other" in shown
    assert rlhf(capsys, *arguments, "--overwrite", sets=[*sets, "seed=1"])[0] == 0
    after = contents(run / "out")
    assert after[folder / "model.safetensors"] != before[folder / "model.safetensors"]
    if command != "ppo":
        (run / "out" / command).rename(run / "out" / f"{command}.checkpoint")
        code, _, shown = rlhf(capsys, *arguments, sets=sets)
        assert code == 2 and f"{folder}.checkpoint: an unfinished run is there" in shown


@pytest.mark.parametrize("command", ["sft", "rm", "ppo"])
def test_a_user_s_own_files_are_never_replaced(run, capsys, command):
    folder = run / "out" / command
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("my model card")
    for flag in ("--overwrite", "--resume"):
        code, _, shown = rlhf(capsys, command, "--config", "run.yaml", flag, sets=SETS if command == "ppo" else [])
        assert code == 2 and f"{folder}: its contents are not those of an earlier run" in shown
    assert (folder / "README.md").read_text() == "my model card"


def test_neither_an_evaluation_nor_a_demo_is_replaced_unasked(run, base, capsys):
    (run / "judge.py").write_text("def a(prompts, a, b):\n    return [1] * len(a)\n")
    sets = [f"eval.candidate={base}", f"eval.baseline={base}", "eval.judge=judge.py:a"]
    arguments = ("eval", "--config", "run.yaml")
    assert rlhf(capsys, *arguments, sets=sets)[0] == 0
    before = contents(run / "out")
    code, _, shown = rlhf(capsys, *arguments, sets=sets)
    assert code == 2 and "an earlier evaluation is there; replace it with --overwrite" in shown
    assert contents(run / "out") == before
    assert rlhf(capsys, *arguments, "--overwrite", sets=sets)[0] == 0
    (run / "demo").mkdir()
    (run / "demo" / "report.json").write_text("{}")
    code, _, shown = rlhf(capsys, "demo", "--output", "demo")
    assert code == 2 and "contains a finished demo; replace it with --overwrite" in shown
    assert [path.name for path in (run / "demo").iterdir()] == ["report.json"]
