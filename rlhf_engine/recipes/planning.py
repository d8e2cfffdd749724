"""The memory plan of a run, computed from its config and the `config.json` of its models before any weight is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rlhf_engine.config import RunConfig
from rlhf_engine.files import write_json
from rlhf_engine.memory.arena import resident_mb
from rlhf_engine.memory.malloc import return_freed_blocks
from rlhf_engine.model.pretrained import base_folder, is_adapter
from rlhf_engine.planner import MemoryPlan, ModelShape, UnknownMemoryError, Workload
from rlhf_engine.planner.report import refuse

PLAN = "plan.json"


def check_reference(config: RunConfig) -> None:
    """Raise ValueError for a reference that the policy does not allow: what it shares with the policy must not change."""
    kind, rank, top = config.ppo.reference, config.adapter.rank, config.model.train_layers
    others = ["adapter_off"] * (rank > 0) + ["hydra"] * (top is not None) + ["frozen_copy"]
    expected = " or ".join(repr(name) for name in others)
    if config.memory.reference == "host" and (rank or top is not None):
        shared = "adapter.rank" if rank else "model.train_layers"
        raise ValueError(
            f"memory.reference: got 'host' with {shared}, expected 'device': the reference shares the frozen layers of the "
            "policy; leave memory.reference out"
        )
    if kind == "adapter_off" and not rank:
        raise ValueError(
            f"ppo.reference: got 'adapter_off' with adapter.rank 0, expected {expected}: without an adapter, the weights of "
            "the policy change; set adapter.rank to train an adapter"
        )
    if kind == "hydra" and top is None:
        changed = "every layer has an adapter" if rank else "every layer changes"
        raise ValueError(
            f"ppo.reference: got 'hydra' without model.train_layers, expected {expected}: {changed}, so the policy shares no "
            "lower layers with its reference; set model.train_layers to train only the top layers"
        )


def workload_of(config: RunConfig, model: str | None = None) -> Workload:
    """Return the workload of `rlhf ppo`; `model` is a folder or a preset that replaces `model.path`.

    Without `reward.path`, `reward.function` and `reward.url`, the reward model is assumed to have the policy's shape, and to be
    an adapter on the same weights if the run has adapters.

    Raises:
        ValueError: there is no model, or a `config.json` cannot be read.
    """
    check_reference(config)
    path = model or config.model.path
    if path is None:
        raise ValueError("model.path is not set; set it to a folder, or pass --model with a folder or a size")
    base, adapted = base_folder(path), is_adapter(path)
    policy = ModelShape.of(str(base), "model.path")
    if config.reward.by_text:
        return Workload.of(config, policy, None, reference_adapter=adapted)
    if config.reward.path is None:
        return Workload.of(config, policy, policy, reward_adapter=True, reference_adapter=adapted)
    theirs = base_folder(config.reward.path)
    shared = is_adapter(config.reward.path) and theirs.resolve() == base.resolve()
    reward = ModelShape.of(str(theirs), "reward.path")
    return Workload.of(config, policy, reward, reward_adapter=shared, reference_adapter=adapted)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The memory plan that a run follows, or the reason why there is none."""

    plan: MemoryPlan | None = None
    unknown: str = ""
    """Why there is no plan; empty if there is one."""
    before_mb: float = 0.0
    """Resident memory before any weight was read, in 10^6 bytes, on the CPU, where measured peaks include it; else 0."""

    def within(self, config: RunConfig) -> RunConfig:
        """Return `config` with `rollout.batch_size` limited to the plan's slots, and without "auto" for merged adapters.

        Without a plan the limit is `ppo.rollout_batch`, and adapters are not merged.
        """
        most, merge = config.ppo.rollout_batch, config.rollout.merge_adapters
        if self.plan is not None:
            most = self.plan.slots
            merge = self.plan.workload.merge_adapters if config.adapter.rank else merge
        changes = {"batch_size": min(config.rollout.batch_size, most), "merge_adapters": merge}
        return dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **changes))

    @property
    def kv_bytes(self) -> int | None:
        """Bytes that keys and values may use under a budget; None without a budget: no limit."""
        return None if self.plan is None or self.plan.workload.budget is None else self.plan.kv_bytes

    def metrics(self) -> dict[str, float]:
        """Return the planned peaks in 10^6 bytes, which are logged with the measured peaks of every update.

        Both count the same memory. On a GPU they exclude CUDA's context, which torch's allocator does not count.
        """
        if self.plan is None:
            return {}
        kept = self.plan.kept - (0 if self.plan.workload.device == "cpu" else self.plan.persistent["context"])
        peaks = {name: self.before_mb + (kept + phase.total) / 1e6 for name, phase in self.plan.phases.items()}
        return {f"planned_{name}_mb": peak for name, peak in (peaks | {"peak": max(peaks.values())}).items()}

    def write(self, folder: str | Path) -> None:
        """Write plan.json to `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / PLAN, {"unknown": self.unknown} if self.plan is None else self.plan.to_dict())


def plan_run(config: RunConfig) -> RunPlan:
    """Return the memory plan that `rlhf ppo` follows, computed before any weight is read.

    There is no plan if a model's folder has no `config.json`: loading reports that error in more detail. Without
    `memory.budget` there is no plan either for a model or an objective whose memory is unknown. A budget on the CPU makes
    the process return freed blocks to the system.

    Raises:
        ValueError: the budget is too small, or it is set and the memory is unknown.
    """
    folders = [config.model.path] + [config.reward.path] * (not config.reward.by_text)
    if any(folder is None or not (base_folder(folder) / "config.json").is_file() for folder in folders):
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
