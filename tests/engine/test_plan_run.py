"""The engine runs by its memory plan, and `rlhf plan` prints it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from rlhf_engine.config import RunConfig
from rlhf_engine.memory import MemoryPlan, ModelShape, Workload
from rlhf_engine.memory.table import items_table
from rlhf_engine.model.reward_model import RewardModel
from tests.engine.cli_run import new_model, new_run, read_lines, rlhf


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with a base model and its reward model."""
    folder = tmp_path_factory.mktemp("planned")
    new_run(folder, new_model(folder / "base"))
    RewardModel.from_causal_lm(AutoModelForCausalLM.from_pretrained(folder / "base"), 0).save(folder / "rm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "rm" / name).write_text((folder / "base" / name).read_text())
    return folder


def ppo(capsys, folder, out, *sets):
    paths = [f"reward.path={folder / 'rm'}", f"output_dir={folder / out}"]
    return rlhf(capsys, "ppo", "--config", folder / "run.yaml", sets=[*paths, *sets])


BATCH = ("ppo.rollout_batch=40", "ppo.minibatch=2", "ppo.microbatch=1", "rollout.batch_size=40")


def planned(folder):
    """The plan of `ppo` with `BATCH` and no budget."""
    config = RunConfig.from_dict(yaml.safe_load((folder / "run.yaml").read_text()))
    shape = ModelShape.of(str(folder / "base"))
    ppo = replace(config.ppo, rollout_batch=40, minibatch=2, microbatch=1)
    return MemoryPlan.of_run(replace(config, ppo=ppo, rollout=replace(config.rollout, batch_size=40)), shape, shape)


def test_ppo_runs_by_its_plan(trained, capsys):
    code, _, err = ppo(capsys, trained, "free", *BATCH)
    assert code == 0, err
    plan = planned(trained)
    written = json.loads((trained / "free" / "plan.json").read_text())
    assert written == plan.to_dict() and written["slots"] == 40
    line = read_lines(trained / "free" / "metrics.jsonl")[-1]
    assert line["planned_peak_mb"] == plan.peak / 1e6 and line["peak_rss_mb"] > 0

    # A budget for 20 slots of 40: fewer sequences together, the same ones.
    budget = plan.kept + MemoryPlan.of(replace(plan.workload, slots=20)).phases["generate"].total
    code, _, err = ppo(capsys, trained, "tight", *BATCH, f"memory.budget={budget}")
    assert code == 0, err
    assert json.loads((trained / "tight" / "plan.json").read_text())["slots"] == 20
    timed = ("seconds_", "tokens_per", "sampled_tokens", "peak_", "planned_peak_mb")
    runs = [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in (line, read_lines(trained / "tight" / "metrics.jsonl")[-1])
    ]
    assert runs[0] == runs[1]


def test_ppo_refuses_a_budget_before_it_starts(trained, capsys):
    code, _, err = ppo(capsys, trained, "refused", *BATCH, "memory.budget=400KB")
    assert code == 2 and err.startswith("rlhf: memory.budget: got 0.4 MiB, which is") and "would fit" not in err
    assert not (trained / "refused" / "metrics.jsonl").exists()


def test_ppo_of_an_unknown_architecture_runs_without_a_plan(trained, capsys, tmp_path):
    new_run(tmp_path, new_model(tmp_path / "base", family="gemma2"))
    source = tmp_path / "reward.py"
    source.write_text("def length(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    sets = [f"reward.function={source}:length", "ppo.value_init=zero"]
    command = ("ppo", "--config", tmp_path / "run.yaml")
    code, _, err = rlhf(capsys, *command, sets=sets)
    assert code == 0, err
    assert "'gemma2'" in json.loads((tmp_path / "out" / "plan.json").read_text())["unknown"]
    assert "planned_peak_mb" not in read_lines(tmp_path / "out" / "metrics.jsonl")[-1]
    code, _, err = rlhf(capsys, *command, sets=[*sets, "memory.budget=1GiB"])
    assert code == 2 and "got model_type 'gemma2'" in err


def test_the_command_prints_the_table_and_draws(tmp_path, capsys):
    arguments = (
        "--model",
        "qwen2.5-0.5b",
        "--gpu-memory",
        "4GiB",
        "--gpu-memory",
        "80GiB",
        "--output",
        tmp_path / "out",
    )
    code, out, err = rlhf(capsys, "plan", *arguments)
    assert code == 0, err
    plan = MemoryPlan.of(replace(Workload.of(RunConfig(), *[ModelShape.of("qwen2.5-0.5b")] * 2), device="cuda"))
    assert items_table(plan) in out and "optimizer_state" in out
    assert "of 4.00 GiB: does not fit" in out and "of 80.00 GiB" in out
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == plan.to_dict()
    assert (tmp_path / "out" / "plan.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = rlhf(capsys, "plan", "--model", "qwen2.5-0.5b", "--gpu-memory", "much")
    assert code == 2 and "--gpu-memory: got 'much', expected a size such as 24GiB" in err
    code, _, err = rlhf(capsys, "plan")
    assert code == 2 and "model.path: got nothing" in err


def test_readme_shows_what_the_command_prints():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    plan = MemoryPlan.of(replace(Workload.of(RunConfig(), *[ModelShape.of("qwen2.5-7b")] * 2), device="cuda"))
    assert items_table(plan) in readme
