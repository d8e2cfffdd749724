"""README's "Train your own": the config and the commands that stand there are a chain from a base model to PPO-ptx."""

import json
import re
import shlex
from pathlib import Path

import pytest

from rlhf_engine.cli import main
from tests.engine.cli_run import new_model, new_run

README = Path(__file__).parents[2] / "README.md"
SMALL = (
    "sft.epochs=1 ppo.updates=1 ppo.rollout_batch=4 ppo.minibatch=2 ppo.microbatch=2 "
    "rollout.max_response_tokens=6 rollout.max_prompt_tokens=8"
)


def test_train_your_own_runs_as_it_stands(tmp_path, capsys, monkeypatch):
    section = README.read_text().split("## Train your own")[1].split("\n## ")[0]
    config, commands = re.search(r"```yaml\n(.*?)```\n+```\n(.*?)```", section, re.S).groups()
    lines = [shlex.split(line, comments=True) for line in commands.replace("\\\n", " ").splitlines()]
    assert [(line[0], line[1]) for line in lines] == [("rlhf", stage) for stage in ("sft", "rm", "ppo", "ppo")]
    new_run(tmp_path, new_model(tmp_path / "base"))
    (tmp_path / "pretrain.txt").write_text("yes or no\n\nmaybe so\n\n" * 40)
    (tmp_path / "my.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        with pytest.raises(SystemExit) as end:
            main([*line[1:], *(part for override in SMALL.split() for part in ("--set", override))])
        assert not end.value.code, capsys.readouterr().err
    numbers = [json.loads(line) for line in Path("runs/mine_ptx/metrics.jsonl").read_text().splitlines()]
    assert numbers[-1]["ptx_loss"] > 0
    for folder in ("runs/mine/sft", "runs/mine/rm", "runs/mine/ppo", "runs/mine_ptx/ppo"):
        assert (Path(folder) / "model.safetensors").is_file()
