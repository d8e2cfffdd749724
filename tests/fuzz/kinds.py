"""All kinds, and the distribution of cases over kinds and processes."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Collection, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhf_engine.cli.options import quiet
from tests.fuzz import folders, texts
from tests.fuzz.harness import Kind, Report, run_case

KINDS: dict[str, type[Kind]] = {
    kind.name: kind
    for kind in (
        texts.JsonLines, texts.ConfigFile, texts.Overrides, texts.RunFiles, folders.TokenizerFiles, folders.ModelFolder,
        folders.RewardFolder, folders.AdapterFolder, folders.CheckpointFolder,
    )
}  # fmt: skip

Work = list[tuple[str, int]]
"""Kinds and numbers of cases."""


def start(name: str, folder: Path) -> Kind:
    """Return a kind whose valid files are in `folder`, with the libraries as silent as in a command."""
    os.environ["RUST_BACKTRACE"] = "0"
    quiet()
    logging.disable()  # a notice is no part of an error
    return KINDS[name](folder)


def fuzz(cases: int, seed: int = 0, names: Collection[str] = tuple(KINDS), *, processes: int = 2) -> Report:
    """Run about `cases` cases in child processes and return their counts and faults.

    A case that ends its process is a fault too; the other cases of that process then run in a new one.
    """
    total = sum(KINDS[name].share for name in names)
    work: Work = [(name, number) for name in names for number in range(max(1, cases * KINDS[name].share // total))]
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for index in range(processes):
            _launch(running, work[index::processes], seed, Path(folder) / f"{index}")
        while running:
            child = next(iter(running))
            _, status = os.waitpid(child, 0)
            part, place = running.pop(child)
            done, died = _read(report, place / "log", seed)
            if died is not None:
                report.add_fault(*died, seed, f"the process ended with status {status}")
            if done < len(part):
                _launch(running, part[done:], seed, place.with_name(place.name + "x"))
    return report


def _launch(running: dict[int, tuple[Work, Path]], work: Work, seed: int, place: Path) -> None:
    place.mkdir()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _run(work, seed, place)
            status = 0
        finally:
            os._exit(status)
    running[child] = (work, place)


def _run(work: Work, seed: int, place: Path) -> None:
    """Run the cases in this process, with a line in the log before and after each."""
    with (place / "log").open("w", buffering=1) as log:
        for name, cases in groupby(work, key=lambda one: one[0]):
            (place / name).mkdir()
            kind = start(name, place / name)
            for _, number in cases:
                log.write(json.dumps([name, number]) + "\n")
                begin = time.process_time()
                fault = run_case(kind, seed, number)
                log.write(json.dumps([kind.accepted, time.process_time() - begin, fault]) + "\n")


def _read(report: Report, path: Path, seed: int) -> tuple[int, tuple[str, int] | None]:
    """Add the cases in a log to `report`; return how many there are, and the last one if it did not end."""
    lines: list[Any] = [json.loads(line) for line in path.read_text().splitlines()]
    pairs: Iterable[Any] = zip(lines[::2], lines[1::2], strict=False)
    for (name, number), (accepted, seconds, fault) in pairs:
        report.slowest[name] = max(seconds, report.slowest.get(name, 0.0))
        report.seconds[name] += seconds
        (report.accepted if accepted else report.refused)[name] += 1
        if fault is not None:
            report.add_fault(name, number, seed, fault)
    begun = (len(lines) + 1) // 2
    return begun, tuple(lines[-1]) if len(lines) % 2 else None
