"""Attempts to run a stage under the faults of a seed, the resumed run without faults, and the comparison."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
import yaml

from rlhf_engine.cli.failures import notes, reported
from rlhf_engine.recipes.session import Stopped
from tests.engine.faults.disk import Fault, FaultyDisk, Killed
from tests.engine.faults.points import BACKWARD_FAULTS, REWARD_FAULTS, TIMED_FAULTS, Points, reached
from tests.engine.faults.runs import (
    CASES,
    command,
    config_of,
    difference,
    no_drawing,
    outcome,
    prepare,
    rough_difference,
)
from tests.engine.faults.schedule import Counts, Schedule, case_of, schedule_of


class Wrong(AssertionError):
    """A run that ended with other bits, could not be resumed, or failed without a message of one line."""


@dataclass
class Undisturbed:
    """A run without faults."""

    found: dict[str, Any]
    counts: Counts


class Simulator:
    """Runs of seeds in a folder with the files of all cases. `done` counts faults by kind, `ends` how attempts ended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.undisturbed: dict[str, Undisturbed] = {}
        self.fired = False
        """Whether the fault of the last attempt has happened."""
        self.done: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        prepare(folder)

    def run(self, seed: int, say=lambda line: None) -> None:
        """Run the schedule of a seed.

        Raises:
            Wrong: the run did not end as the undisturbed one.
        """
        name = case_of(seed)
        schedule = schedule_of(seed, self._undisturbed(name).counts)
        say(f"{schedule}")
        rng = Random(f"disk {seed}")
        for fault in (*schedule.faults, None):
            if self._attempt(schedule, fault, rng, say):
                break
            self._move_rescued(schedule)
        else:
            raise Wrong(f"{name}: the run without faults did not end")
        # A run that ends in spite of a lack of memory has used smaller passes.
        smaller = self.fired and fault is not None and fault.kind == "out_of_memory"
        compare = rough_difference if smaller else difference
        wrong = compare(outcome(self.out, CASES[name].stage), self.undisturbed[name].found)
        if wrong is not None:
            raise Wrong(f"{name}: {wrong}")

    def _undisturbed(self, name: str) -> Undisturbed:
        """Return the run of a case without faults, which saves after every step."""
        if name not in self.undisturbed:
            case = CASES[name]
            every = () if case.section is None else (f"{case.section}.checkpoint_every=1",)
            schedule = Schedule(-1, name, every, 0.0, (), False)
            self._fresh()
            disk = FaultyDisk(self.out, None, Random(0))
            points = Points(None, disk)
            self._call(schedule, disk, points)
            counts = Counts(disk.count, points.rewards, points.backwards)
            self.undisturbed[name] = Undisturbed(outcome(self.out, case.stage), counts)
        self._fresh()
        return self.undisturbed[name]

    def _fresh(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()

    def _attempt(self, schedule: Schedule, fault: Fault | None, rng: Random, say) -> bool:
        """Run a case once; return whether it ended."""
        outside = fault is not None and fault.kind in (*REWARD_FAULTS, *TIMED_FAULTS, *BACKWARD_FAULTS)
        disk = FaultyDisk(self.out, None if outside else fault, rng, seconds=schedule.seconds)
        points = Points(fault if outside else None, disk)
        ended, text = False, "ended"
        try:
            self._call(schedule, disk, points)
            ended = True
        except Killed:
            text = "killed"
        except Stopped as stopped:
            text = f"stopped{notes(stopped)}"
        except BaseException as error:
            text, code = reported(error)
            text = f"exit {code}: {text}{notes(error)}"
            if not disk.fired or code not in (1, 2) or "an error in rlhf" in text:
                raise Wrong(f"{schedule}, {fault}: {text}") from error
        self.fired = disk.fired
        say(f"  {fault}: {text}")
        self.done[f"{fault.kind if fault else 'none'}{'' if disk.fired else ', not reached'}"] += 1
        self.ends[text.partition(":")[0].partition(";")[0]] += 1
        return ended

    def _call(self, schedule: Schedule, disk: FaultyDisk, points: Points) -> None:
        case = CASES[schedule.case]
        config = config_of(self.folder, case, self.out, *schedule.settings)
        with _quick(self.folder), disk.mounted(), _signals_end(disk), reached(points):
            command(case, config, self.folder)()

    def _move_rescued(self, schedule: Schedule) -> None:
        for rescued in self.out.rglob("*.rescued"):
            folder = rescued.with_name(rescued.name.removesuffix(".rescued"))
            if schedule.moves_rescued and (rescued / "trainer.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                rescued.rename(folder)
            else:
                shutil.rmtree(rescued)


@contextmanager
def _quick(folder: Path) -> Iterator[None]:
    """Leave out what takes time and holds no state: drawing, TensorBoard, YAML in Python. Keep temporary files in `folder`."""

    def dump(content: object, **options: Any) -> str:
        return yaml.dump(content, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), **options)

    (folder / "tmp").mkdir(exist_ok=True)
    with no_drawing(), ExitStack() as patches:
        for target, name, value in (
            ("rlhf_engine.trackers", "SummaryWriter", lambda *_, **__: mock.MagicMock()),
            ("rlhf_engine.config.files.yaml", "safe_dump", dump),
        ):
            patches.enter_context(mock.patch(f"{target}.{name}", value))
        patches.enter_context(mock.patch.object(tempfile, "tempdir", str(folder / "tmp")))
        yield


@contextmanager
def _signals_end(disk: FaultyDisk) -> Iterator[None]:
    """End the simulated process at a signal that the run does not handle."""
    before = signal.signal(signal.SIGTERM, lambda *_: disk.die("kill"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def simulator(near: Path | None = None) -> Iterator[Simulator]:
    """Return a simulator in a temporary folder, in memory if the system has such a folder."""
    memory = Path("/dev/shm")
    place = near or (memory if os.access(memory, os.W_OK) else None)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=place, prefix="rlhf-faults-") as folder:
        yield Simulator(Path(folder))
    gc.collect()
