"""The engine follows its memory plan, and `rlhf plan` prints it."""

import json
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_engine.config import RunConfig, load_config
from rlhf_engine.planner import MemoryPlan, ModelShape, Workload
from rlhf_engine.planner.report import items_table
from rlhf_engine.recipes import planning
from rlhf_engine.recipes.planning import RunPlan
from tests.engine.helpers.cli_run import new_model, new_run, read_lines, rlhf

BATCH = ("ppo.rollout_batch=40", "ppo.minibatch=2", "ppo.microbatch=1", "rollout.batch_size=40")


def with_function(folder):
    """Return overrides for a Python function as the reward, so that the keys and values are the largest item."""
    (folder / "reward.py").write_text("def length(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    return [f"reward.function={folder / 'reward.py'}:length", "ppo.value_init=zero"]


def ppo(capsys, folder, out, *sets):
    sets = [*with_function(folder), f"output_dir={folder / out}", *sets]
    return rlhf(capsys, "ppo", "--config", folder / "run.yaml", sets=sets)


def test_ppo_follows_its_plan(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planning, "resident_mb", lambda: 123.5)
    new_run(tmp_path, new_model(tmp_path / "base"))
    code, _, err = ppo(capsys, tmp_path, "free", *BATCH)
    assert code == 0, err
    config = load_config(tmp_path / "run.yaml", [*with_function(tmp_path), *BATCH])
    plan = MemoryPlan.of_run(config, ModelShape.of(str(tmp_path / "base")), None)
    written = json.loads((tmp_path / "free" / "plan.json").read_text())
    assert written == plan.to_dict() and written["slots"] == 40
    line = read_lines(tmp_path / "free" / "metrics.jsonl")[-1]
    planned = {name: line[f"planned_{name}_mb"] for name in plan.phases}
    before = planned["train"] - (plan.kept + plan.phases["train"].total) / 1e6
    assert before == pytest.approx(123.5)
    for name, phase in plan.phases.items():
        assert planned[name] == pytest.approx(before + (plan.kept + phase.total) / 1e6)
    assert line["planned_peak_mb"] == max(planned.values())

    # A budget for 20 of the 40 slots: fewer sequences are decoded together, with the same results.
    budget = MemoryPlan.of(replace(plan.workload, slots=20)).peak
    code, _, err = ppo(capsys, tmp_path, "tight", *BATCH, f"memory.budget={budget}B")
    assert code == 0, err
    assert json.loads((tmp_path / "tight" / "plan.json").read_text())["slots"] == 20
    timed = ("seconds_", "tokens_per", "sampled_tokens", "peak_", "planned_")
    runs = [
        {name: value for name, value in row.items() if not name.startswith(timed)}
        for row in (line, read_lines(tmp_path / "tight" / "metrics.jsonl")[-1])
    ]
    assert runs[0] == runs[1]

    # A budget without room for one sequence is refused before anything is read or written.
    code, _, err = ppo(capsys, tmp_path, "refused", *BATCH, "memory.budget=1MB")
    assert code == 2 and err.startswith("rlhf: memory.budget: got 1.0 MiB, which is")
    assert (
        "no room for the keys and values of one sequence of 14 tokens" in err
        and "no strategy that was tried fits" in err
    )
    assert not (tmp_path / "refused").exists()


def test_a_budget_reduces_the_pages_and_not_the_sequences(tmp_path, capsys):
    """Pages have 64 tokens and sequences at most 184: three pages per sequence, two of them at its start."""
    new_run(tmp_path, new_model(tmp_path / "base", max_position_embeddings=192))
    sizes = ("rollout.cache=paged", "rollout.max_response_tokens=176", *BATCH)
    code, _, err = ppo(capsys, tmp_path, "free", *sizes)
    assert code == 0, err
    free = json.loads((tmp_path / "free" / "plan.json").read_text())
    page = free["phases"]["generate"]["kv_cache"] // (3 * 40 + 1)
    budget = sum(free["persistent"].values()) + sum(free["phases"]["generate"].values()) - 35 * page
    code, _, err = ppo(capsys, tmp_path, "tight", *sizes, f"memory.budget={budget}B")
    assert code == 0, err
    tight = json.loads((tmp_path / "tight" / "plan.json").read_text())
    assert (tight["slots"], tight["phases"]["generate"]["kv_cache"]) == (40, (3 * 40 + 1 - 35) * page)
    rows = [read_lines(tmp_path / run / "metrics.jsonl")[-1] for run in ("free", "tight")]
    assert rows[0]["restarted_sequences"] == 0 < rows[1]["restarted_sequences"]
    assert rows[0]["score_mean"] == rows[1]["score_mean"] and rows[0]["kl"] == rows[1]["kl"]


def test_the_batch_size_is_limited_to_the_slots_of_the_plan():
    config = RunConfig.from_dict({"rollout": {"batch_size": 8}, "ppo": {"rollout_batch": 64, "minibatch": 64}})
    shape = ModelShape.of("qwen2.5-0.5b")
    workload = replace(Workload.of(config, shape, None), slots=8)
    tight = replace(MemoryPlan.of(workload), slots=3)
    assert RunPlan(tight).within(config).rollout.batch_size == 3
    assert RunPlan(MemoryPlan.of(workload)).within(config) == config == RunPlan().within(config)
    few = RunConfig.from_dict(
        {"rollout": {"batch_size": 8}, "ppo": {"rollout_batch": 4, "minibatch": 4, "microbatch": 4}}
    )
    assert RunPlan().within(few).rollout.batch_size == 4
    assert RunPlan(MemoryPlan.of(Workload.of(few, shape, None))).within(few).rollout.batch_size == 4


def test_a_budget_and_pages_work_for_one_sequence_of_one_page(tmp_path, capsys):
    new_run(tmp_path, new_model(tmp_path / "base"))
    one = ("rollout.cache=paged", "ppo.rollout_batch=1", "ppo.minibatch=1", "ppo.microbatch=1", "memory.budget=100GiB")
    code, _, err = ppo(capsys, tmp_path, "one", *one)
    assert code == 0, err


def test_ppo_of_an_unknown_architecture_runs_without_a_plan(capsys, tmp_path):
    new_run(tmp_path, new_model(tmp_path / "base", family="gemma2"))
    sets = [*with_function(tmp_path), "model.attention=eager"]
    command = ("ppo", "--config", tmp_path / "run.yaml")
    code, _, err = rlhf(capsys, *command, sets=sets)
    assert code == 0, err
    assert "'gemma2'" in json.loads((tmp_path / "out" / "plan.json").read_text())["unknown"]
    assert "planned_peak_mb" not in read_lines(tmp_path / "out" / "metrics.jsonl")[-1]
    code, _, err = rlhf(capsys, *command, "--overwrite", sets=[*sets, "memory.budget=1GiB"])
    assert code == 2 and "got model_type 'gemma2'" in err


FREEING = """
import runpy, sys
freeing = runpy.run_path("rlhf_engine/memory/malloc.py")
if sys.argv[1] == "returned":
    assert freeing["return_freed_blocks"]()
large = bytearray(b"x") * 30_000_000
del large  # glibc's threshold is now 30 MB
blocks = [bytearray(b"x") * 600_000 for _ in range(200)]
def resident():
    return int(open("/proc/self/statm").read().split()[1])
before = resident()
del blocks[::2]
print((before - resident()) * 4096 / 1e6)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries manage freed blocks differently")
@pytest.mark.parametrize("way, least, most", [("kept", -1, 10), ("returned", 50, 65)])
def test_freed_blocks_go_back_to_the_system(way, least, most):
    """Every second of 200 blocks of 0.6 MB is freed, which leaves holes between the other blocks.

    Printing the result takes memory too, so that a few kilobytes less than nothing may be returned.
    """
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", FREEING, way], cwd=root, capture_output=True, text=True, check=True)
    assert least <= float(done.stdout) <= most


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
    for text, example in (("0", "24GiB"), ("24", "24GiB"), ("80 KB", "80GiB")):
        code, _, err = rlhf(capsys, "plan", "--model", "qwen2.5-0.5b", "--gpu-memory", text)
        assert code == 2 and f"--gpu-memory: got '{text}', which is" in err and f"as in {example}" in err
    code, out, err = rlhf(capsys, "plan", "--model", "qwen2.5-0.5b", "--gpu-memory", "80 GB", "--gpu-memory", "80GiB")
    assert code == 0 and err.count("--gpu-memory 80") == 1 and "--gpu-memory 80 GB is 74.51 GiB" in err
    code, out, _ = rlhf(capsys, "plan", "--model", "qwen2.5-72b", "--gpu-memory", "40GiB")
    assert code == 0 and re.search(r"does not fit, [\d.]+ GiB too much; not even one sequence", out)
    assert "KV pool" not in out and "micro-batch 0" not in out
    assert re.search(r"no strategy that was tried fits; the smallest peak is .*adapter.rank=16, model.quant=nf4", out)
    code, out, err = rlhf(capsys, "plan", "--model", "qwen2.5-0.5b", "--output", tmp_path / "out" / "plan.json")
    assert code == 2 and not out and "plan.json is a file; give a folder" in err
    (tmp_path / "config.json").write_text("{")
    code, _, err = rlhf(capsys, "plan", "--model", tmp_path)
    assert code == 2 and f"{tmp_path / 'config.json'}: not valid JSON" in err
    code, _, err = rlhf(capsys, "plan")
    assert code == 2 and "model.path is not set" in err


def test_the_guide_shows_what_the_command_prints():
    guide = (Path(__file__).parents[3] / "docs" / "guides" / "memory.md").read_text()
    plan = MemoryPlan.of(replace(Workload.of(RunConfig(), *[ModelShape.of("qwen2.5-7b")] * 2), device="cuda"))
    assert items_table(plan) in guide
