"""The memory plan of a run, from its config and the `config.json` of its models, before a weight is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlhf_engine.config import RunConfig
from rlhf_engine.files import write_json
from rlhf_engine.memory.arena import resident_mb
from rlhf_engine.memory.malloc import return_freed_blocks
from rlhf_engine.planner import MemoryPlan, ModelShape, UnknownMemoryError, Workload
from rlhf_engine.planner.report import refuse

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


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run is held to: a plan, or why there is none."""

    plan: MemoryPlan | None = None
    unknown: str = ""
    before_mb: float = 0.0
    """What the process held before a weight was read, in 10^6 bytes, where measured peaks count it: on the CPU."""

    def within(self, config: RunConfig) -> RunConfig:
        """`config` with as many sequences decoded together as the plan has room for, and no more than a rollout has."""
        most = config.ppo.rollout_batch if self.plan is None else self.plan.slots
        slots = min(config.rollout.batch_size, most)
        return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, batch_size=slots))

    @property
    def kv_bytes(self) -> int | None:
        """What keys and values may take under a budget; None: all that they ask for."""
        return None if self.plan is None or self.plan.workload.budget is None else self.plan.kv_bytes

    def metrics(self) -> dict[str, float]:
        """Planned peaks in 10^6 bytes, to stand beside the measured ones of every update and counted as those are.

        On a GPU that is without the context of CUDA, which torch's allocator does not see.
        """
        if self.plan is None:
            return {}
        kept = self.plan.kept - (0 if self.plan.workload.device == "cpu" else self.plan.persistent["context"])
        peaks = {name: self.before_mb + (kept + phase.total) / 1e6 for name, phase in self.plan.phases.items()}
        return {f"planned_{name}_mb": peak for name, peak in (peaks | {"peak": max(peaks.values())}).items()}

    def write(self, folder: str | Path) -> None:
        """plan.json in `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / PLAN, {"unknown": self.unknown} if self.plan is None else self.plan.to_dict())


def plan_run(config: RunConfig) -> RunPlan:
    """The plan that `rlhf ppo` runs by, made before a weight is read.

    There is none for a folder that is not whole, of which loading it has more to say, nor, without a `memory.budget`, for a
    model or an objective whose memory is not known. On the CPU a budget has freed blocks returned to the system. Raises
    ValueError where the budget is too small.
    """
    folders = [config.model.path] + [config.reward.path] * (config.reward.function is None)
    if any(folder is None or not (Path(folder) / "config.json").is_file() for folder in folders):
        return RunPlan(unknown="a model's folder without a config.json")
    try:
        plan = MemoryPlan.of(workload_of(config))
    except UnknownMemoryError as error:
        if config.memory.budget is not None:
            raise
        return RunPlan(unknown=str(error))
    refuse(plan)
    if plan.workload.budget is not None and plan.workload.device == "cpu":
        return_freed_blocks()
    return RunPlan(plan, before_mb=resident_mb() if plan.workload.device == "cpu" else 0.0)
