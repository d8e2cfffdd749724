"""A profile of one update by phase and operation, on a CPU or a GPU, by torch.profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from rlhf_engine.files import with_new_file
from rlhf_engine.ppo.callbacks import Callback
from rlhf_engine.ppo.trainer import PHASE, PPOTrainer

FOLDER, TRACE, TABLE = "profile", "trace.json", "profile.md"
_LISTED = 12
"""Operations per phase in the table."""


@dataclass
class Operation:
    """The calls of an operation in a phase, without those of the operations that it calls."""

    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    """Of matrix products, as torch counts them."""


@dataclass
class Phase:
    """A phase of the profiled update."""

    seconds: float = 0.0
    operations: dict[str, Operation] = field(default_factory=lambda: defaultdict(Operation))

    @property
    def flops(self) -> float:
        """FLOPs of all matrix products."""
        return sum(one.flops for one in self.operations.values())


class UpdateProfile(Callback):
    """Profiles update number `update`, at least 2, and writes a trace for chrome://tracing and a table into `folder`."""

    def __init__(self, folder: Path, update: int) -> None:
        self.folder, self.update = folder, update
        self.active: profile | None = None

    def on_update(self, trainer: PPOTrainer, log: dict[str, float]) -> None:
        """Start the profiler before the update, and write the results after it."""
        if self.active is not None:
            found, self.active = self.active, None
            found.stop()
            self._write(found)
        elif trainer.updates_done == self.update - 1 and trainer.updates_done < trainer.config.updates:
            device = trainer.policy.device.type
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
            self.active = profile(activities=activities, with_flops=True)
            self.active.start()

    def on_end(self, trainer: PPOTrainer, error: BaseException | None) -> None:
        """Stop a profile whose update did not end."""
        if self.active is not None:
            self.active.stop()
            self.active = None

    def _write(self, found: profile) -> None:
        with_new_file(self.folder / TRACE, lambda path: found.export_chrome_trace(str(path)))
        text = table(phases_of(found.events() or []), self.update)
        with_new_file(self.folder / TABLE, lambda path: path.write_text(text))


def phases_of(events: Iterable[Any]) -> dict[str, Phase]:
    """Return the phases in the order of their first start. An operation belongs to the phase in which it starts.

    On a GPU the seconds of an operation are those of its kernels.
    """
    events = list(events)
    spans = [
        (one.time_range.start, one.time_range.end, one.name.removeprefix(PHASE))
        for one in events
        if one.name.startswith(PHASE) and _on_cpu(one)
    ]
    found: dict[str, Phase] = {name: Phase() for _, _, name in sorted(spans)}
    on_device = not all(map(_on_cpu, events))
    for start, end, name in spans:
        found[name].seconds += (end - start) / 1e6
    for event in events:
        name = next((name for start, end, name in spans if start <= event.time_range.start <= end), None)
        if name is None or event.name.startswith(PHASE):
            continue
        operation = found[name].operations[event.name]
        if _on_cpu(event):
            operation.flops += event.flops or 0
        if _on_cpu(event) != on_device:
            operation.calls += 1
            operation.seconds += (event.device_time_total if on_device else event.self_cpu_time_total) / 1e6
    return found


def _on_cpu(event: Any) -> bool:
    return event.device_type.name == "CPU"


def table(phases: dict[str, Phase], update: int) -> str:
    """Return the phases and their largest operations as Markdown."""
    whole = sum(phase.seconds for phase in phases.values())
    lines = [f"# Update {update}", "", "| phase | seconds | share | TFLOP | TFLOP/s |", "|---|---|---|---|---|"]
    for name, phase in phases.items():
        tera = phase.flops / 1e12
        lines.append(
            f"| {name} | {phase.seconds:.3f} | {phase.seconds / whole:.0%} | {tera:.4f} | {tera / phase.seconds:.3f} |"
        )
    lines += ["", "TFLOP are those of matrix products, without attention.", ""]
    for name, phase in phases.items():
        operations = sorted(phase.operations.items(), key=lambda item: -item[1].seconds)[:_LISTED]
        lines += [f"## {name}", "", "| operation | calls | seconds | share |", "|---|---|---|---|"]
        lines += [
            f"| {label.replace('|', ' ')} | {one.calls} | {one.seconds:.3f} | {one.seconds / phase.seconds:.0%} |"
            for label, one in operations
        ]
        lines.append("")
    return "\n".join(lines)
