"""A stage that is killed with `kill -9` at random moments and resumed gives the same bits as an uninterrupted run."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from tests.engine.helpers.cli_run import new_model, new_run, read_lines

DRIVER = '''
"""Run a stage in forked children, each killed at a random one of its audit events, until one finishes."""
import json, os, signal, sys, traceback
from pathlib import Path
from random import Random

import torch

from rlhf_engine.config import load_config
from rlhf_engine.recipes import run_ppo, run_rm, run_sft
from rlhf_engine.recipes.session import continued

stage = sys.argv[1]
run = {"sft": run_sft, "rm": run_rm, "ppo": run_ppo}[stage]
torch.set_num_threads(1)


def child(out, kill_at):
    """Run the stage in a child; return whether it finished, and whether it resumed a checkpoint."""
    checkpoint = Path(out) / (stage if stage == "ppo" else f"{stage}.checkpoint")
    arguments = continued(checkpoint)
    pid = os.fork()
    if pid == 0:
        count, code = 0, 1

        def hook(event, arguments):
            nonlocal count
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            run(load_config("run.yaml", [f"output_dir={out}", *sys.argv[2:]]), **arguments)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            Path("events").write_text(str(count))
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return not os.WIFSIGNALED(status), arguments["resume"]


assert child("whole", -1) == (True, False)
events, results = int(Path("events").read_text()), []
for seed in range(3):
    rng, kills, resumed = Random(seed), 0, 0
    while True:
        ended, from_checkpoint = child(f"out{seed}", rng.randint(events // 4, events) if kills < 3 else -1)
        resumed += from_checkpoint
        if ended:
            break
        kills += 1
    results.append((kills, resumed))
print(json.dumps(results))
'''
SETS = {
    "sft": ("sft.epochs=4", "sft.batch_size=2", "sft.patience=9", "sft.evaluate_every=2", "sft.checkpoint_every=1"),
    "rm": ("reward.epochs=6", "reward.batch_size=2", "reward.evaluate_every=2", "reward.checkpoint_every=1"),
    "ppo": ("ppo.updates=4", "ppo.checkpoint_every=1", "reward.function=rewards.py:reward", "ppo.value_init=zero"),
    "ppo with adapters": (
        *("ppo.updates=4", "ppo.checkpoint_every=1", "reward.function=rewards.py:reward", "ppo.value_init=zero"),
        *("adapter.rank=2", "ppo.value_model=backbone"),
    ),
}


def outcome(out, stage):
    """Return the tensors of the stage's folder, its report, and all metrics that do not depend on time or memory."""
    folder = out / stage
    tensors = {
        f"{path.relative_to(folder)}:{name}": tensor.numpy().tobytes()
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    report = folder / ("trainer.json" if stage == "ppo" else "report.json")
    timed = ("seconds", "per_second", "_mb")
    rows = [
        [(name, value) for name, value in row.items() if not any(part in name for part in timed)]
        for row in read_lines(out / "metrics.jsonl")
    ]
    return tensors, json.loads(report.read_text()), rows


@pytest.mark.parametrize("stage", list(SETS))
def test_a_stage_killed_at_any_moment_ends_with_the_same_bits(tmp_path, stage):
    sets, stage = SETS[stage], stage.partition(" ")[0]
    new_run(tmp_path, new_model(tmp_path / "base"))
    (tmp_path / "rewards.py").write_text("def reward(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    (tmp_path / "driver.py").write_text(DRIVER)
    found = subprocess.run(
        [sys.executable, "driver.py", stage, *sets], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    results = json.loads(found.stdout)
    assert sum(kills for kills, _ in results) >= 5 and sum(resumed for _, resumed in results) >= 2, results
    whole = outcome(tmp_path / "whole", stage)
    for seed in range(3):
        assert outcome(tmp_path / f"out{seed}", stage) == whole, (seed, results)
        names = {path.name for path in (tmp_path / f"out{seed}").iterdir()}
        assert stage in names and not {name for name in names if name.startswith(f"{stage}.")}, names
