"""The configs in rlhf_engine/examples fit the GPU of their name, by the plan, with the model that they name."""

import re
from pathlib import Path

import pytest

import rlhf_engine
from rlhf_engine.config import load_config
from rlhf_engine.config.memory import byte_count
from rlhf_engine.planner import MemoryPlan
from rlhf_engine.planner.cluster import RankPlan
from rlhf_engine.recipes.planning import workload_of

FOLDER = Path(rlhf_engine.__path__[0]) / "examples"
CONFIGS = sorted(FOLDER.glob("*_on_*gb.yaml"))


def test_all_five_are_found():
    assert [path.stem for path in CONFIGS] == [
        *("14b_on_48gb", "32b_on_80gb", "70b_4bit_on_141gb", "8b_full_on_80gb", "8b_on_24gb")
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_fits_its_gpu(path):
    """Peak and budget leave a reserve of 3% and more; the budget takes no sequences from the decode steps beyond a tenth."""
    (command,) = re.findall(r"rlhf plan --config (\S+) --model (\S+) --gpu-memory (\S+)", path.read_text())
    name, model, memory = command
    assert name == path.name and memory.lower() in path.stem
    config = load_config(path)
    assert config.memory.budget is not None
    plan = MemoryPlan.of(workload_of(config, model))
    assert plan.fits and plan.peak <= 0.97 * byte_count(memory, "memory")
    assert plan.slots >= 0.9 * config.rollout.batch_size
    assert plan.largest_microbatch() >= config.ppo.microbatch
    assert bool(config.adapter.rank) != ("full" in path.stem)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_does_not_fit_without_what_it_changes(path):
    """With all weights trained and kept in bfloat16, and state on the device, every model is too large for its GPU."""
    config = load_config(path, ["adapter.rank=0", "model.quant=none", "memory.optimizer_state=resident"])
    model = re.search(r"--model (\S+)", path.read_text())[1]
    assert not MemoryPlan.of(workload_of(config, model)).fits


def test_the_config_for_8_gpus_fits_them():
    """Each rank has a reserve of 3% and more, and all sequences of its decode steps; without shards it does not fit."""
    path = FOLDER / "8_gpus.yaml"
    ((name, model, gpus, gpu),) = re.findall(
        r"rlhf plan --config (\S+) --model (\S+) --gpus (\d+) --gpu (\S+)", path.read_text()
    )
    assert name == path.name and f"{gpus}_gpus" == path.stem
    workload = workload_of(load_config(path), model)
    plan = RankPlan.of(workload, gpu, int(gpus))
    assert plan.peak <= 0.97 * plan.cluster.gpu.memory and plan.kv_bytes == plan.phases["generate"]["kv_cache"]
    assert workload.rollout_batch % int(gpus) == 0 and workload.minibatch % int(gpus) == 0
    assert not RankPlan.of(workload, gpu, int(gpus), shard=1).fits
