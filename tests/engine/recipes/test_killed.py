"""A stage that `kill -9` ends at random moments, and that is resumed, gives the same bits as an undisturbed run.

The moments are operations that Python reports. `make soak` kills at random times, and many more runs.
"""

import json
import subprocess
import sys

import pytest

TRIALS = dict.fromkeys(("sft", "rm", "ppo", "ppo, adapters", "iterate", "generate"), 1)


@pytest.mark.parametrize("name", list(TRIALS))
def test_a_stage_killed_at_any_moment_ends_with_the_same_bits(tmp_path, name):
    """Half of the killed runs continue in a copy of their folder."""
    arguments = ["-m", "tests.engine.helpers.killed", str(tmp_path), name, "--trials", str(TRIALS[name])]
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    trials = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(trials) == TRIALS[name] and [trial["difference"] for trial in trials] == [None] * len(trials), trials
    kills, continued = (sum(trial[key] for trial in trials) for key in ("kills", "continued"))
    assert kills >= TRIALS[name] and continued >= 1, trials


def test_a_checkpoint_continues_in_a_folder_that_has_only_the_checkpoint(tmp_path):
    """The copied checkpoint brings the metrics of its updates."""
    code = """
import shutil, sys
from pathlib import Path
from tests.engine.faults.runs import CASES, command, config_of, no_drawing, outcome, prepare

folder, case = Path(sys.argv[1]), CASES["ppo"]
prepare(folder)
with no_drawing():
    command(case, config_of(folder, case, folder / "whole", "ppo.checkpoint_every=1"), folder)()
    shutil.copytree(folder / "whole" / "checkpoints" / "ppo-2", folder / "copy" / "ppo")
    command(case, config_of(folder, case, folder / "copy"), folder)()
whole, copy = (outcome(folder / out, "ppo") for out in ("whole", "copy"))
assert [row[1] for row in copy["metrics"]] == [("step", step) for step in (1, 2, 3)]
differ = {key for key in whole if whole[key] != copy[key]}
assert differ <= {"samples"}, differ  # responses of earlier updates are not in a checkpoint
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
