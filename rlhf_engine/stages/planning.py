"""The memory plan of a run, from its config and the `config.json` of its models, before a weight is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlhf_engine.config import RunConfig
from rlhf_engine.files import write_json
from rlhf_engine.memory import MemoryPlan, ModelShape, UnknownMemoryError, Workload
from rlhf_engine.memory.freeing import return_freed_blocks
from rlhf_engine.memory.table import refuse

PLAN = "plan.json"


def workload_of(config: RunConfig, model: str | None = None) -> Workload:
    """The workload of `rlhf ppo`; `model` is a folder or a preset in place of `model.path`.

    A reward model that is not named is taken to be of the policy's shape.
    """
    path = model or config.model.path
    if path is None:
        raise ValueError("model.path: got nothing, expected a folder, or --model with a folder or a size")
    policy = ModelShape.of(path, "model.path")
    if config.reward.function is not None:
        return Workload.of(config, policy, None)
    reward = policy if config.reward.path is None else ModelShape.of(config.reward.path, "reward.path")
    return Workload.of(config, policy, reward)


def plan_run(config: RunConfig) -> MemoryPlan | None:
    """The plan that `rlhf ppo` runs by, written to OUTPUT_DIR/plan.json; None where there is none to be had.

    That is a folder that is not whole, of which loading it has more to say, and, without a `memory.budget`, a model or an
    objective whose memory is not known: plan.json then says so. On the CPU a budget has freed blocks returned to the system.
    Raises ValueError where the budget is too small.
    """
    folders = [config.model.path] + [config.reward.path] * (config.reward.function is None)
    if any(folder is None or not (Path(folder) / "config.json").is_file() for folder in folders):
        return None
    try:
        plan = MemoryPlan.of(workload_of(config))
    except UnknownMemoryError as error:
        if config.memory.budget is not None:
            raise
        _write(config, {"unknown": str(error)})
        return None
    refuse(plan)
    _write(config, plan.to_dict())
    if plan.workload.budget is not None and plan.workload.device == "cpu":
        return_freed_blocks()
    return plan


def within(plan: MemoryPlan | None, config: RunConfig) -> RunConfig:
    """`config` with as many sequences decoded together as the plan has room for."""
    if plan is None or plan.slots >= plan.workload.slots:
        return config
    return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, batch_size=plan.slots))


def planned_peak(plan: MemoryPlan | None) -> dict[str, float]:
    """The plan's peak in 10^6 bytes, for the metrics of a step."""
    return {} if plan is None else {"planned_peak_mb": plan.peak / 1e6}


def _write(config: RunConfig, content: dict[str, object]) -> None:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, content)
