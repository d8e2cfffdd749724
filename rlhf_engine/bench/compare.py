"""Differences between two runs that exceed their spread.

The change of a case is the ratio of its floors. It counts if its logarithm exceeds `CRITICAL` standard deviations, which
combine the errors of both floors, what moved floors between the runs without a cause in the code (the spread of the changes
of all cases, and the change of the matrix product and the copy, which are not our code), and how busy the machine was. The
comparison reports for each case the smallest slowdown that it would have found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_engine.bench.report import FORMAT, duration, table
from rlhf_engine.bench.samples import CONTENTION_SHARE, LEAST_ERROR, contention, deviation, floor_error
from rlhf_engine.files import read_json

CRITICAL = 3.0
ENOUGH = 5
"""Fewest cases in common whose spread is an estimate of what changes between runs."""
TARGET = 1.2
"""Slowdown that a comparison should find; a case that resolves less is reported."""


@dataclass(frozen=True)
class Change:
    """A case in both runs."""

    suite: str
    name: str
    shape: str
    before: float
    """Floor in seconds."""
    after: float
    resolves: float
    """Smallest ratio, above 1, that counts as a change."""

    @property
    def ratio(self) -> float:
        """Time after by time before."""
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """`slower` or `faster` if the change exceeds the spread, else `same`."""
        return "slower" if self.ratio > self.resolves else "faster" if self.ratio < 1 / self.resolves else "same"


@dataclass(frozen=True)
class Comparison:
    """All cases that both runs have, and what a reader has to know about the runs."""

    changes: list[Change]
    notes: list[str]

    @property
    def slower(self) -> list[Change]:
        """The regressions."""
        return [one for one in self.changes if one.verdict == "slower"]

    def text(self) -> str:
        """Return a table with one line per case, the notes and a summary."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        rows = [
            (one.suite, one.name, one.shape, duration(one.before), duration(one.after), f"{one.ratio - 1:+.1%}",
             f"{one.resolves - 1:.0%}", one.verdict)
            for one in self.changes
        ]  # fmt: skip
        yield from table(("suite", "case", "shape", "before", "after", "change", "resolves", "verdict"), rows)
        yield ""
        yield from (f"note: {note}" for note in self.notes)
        blind = [one for one in self.changes if one.resolves > TARGET]
        if blind:
            worst = max(one.resolves for one in blind) - 1
            yield (
                f"note: {len(blind)} of {len(self.changes)} cases could not show a slowdown of {TARGET - 1:.0%} (the least "
                f"certain: {worst:.0%}); run both again on an idle machine, or with --full"
            )
        slower, faster = (sum(one.verdict == word for one in self.changes) for word in ("slower", "faster"))
        yield f"{slower} slower, {faster} faster, {len(self.changes) - slower - faster} the same within the spread"


def read_run(path: Path) -> dict[str, Any]:
    """Return the record of a run.

    Raises:
        ValueError: the file is not the output of `rlhf bench`.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path}: not a bench.json of this version; `rlhf bench --output FOLDER` writes one")
    return record


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Return the comparison of two records.

    Raises:
        ValueError: no measured case is in both.
    """
    old, new = _cases(before), _cases(after)
    common = [key for key in old if key in new]
    if not common:
        raise ValueError("the two runs have no measured case in common; run the same suites with the same shapes")
    shifts = [math.log(new[key][0] / old[key][0]) for key in common]
    between = max(LEAST_ERROR, deviation(shifts) if len(shifts) >= ENOUGH else 0.0)
    busy = CONTENTION_SHARE * max(contention(run["limits"]["product"]) for run in (before, after))
    machine = _machine_shift(before, after)
    changes = []
    for key in common:
        errors = (*(floor_error(run[key][1]) for run in (old, new)), between, busy)
        threshold = CRITICAL * math.hypot(*errors) + abs(machine)
        changes.append(Change(*key, old[key][0], new[key][0], math.exp(threshold)))
    return Comparison(changes, list(_notes(before, after, old.keys() ^ new.keys(), machine)))


def _cases(record: dict[str, Any]) -> dict[tuple[str, str, str], tuple[float, list[float]]]:
    """Return (suite, case, shape) -> (floor, samples) of every case that was measured."""
    return {
        (suite, case["name"], case["shape"]): (min(case["samples"]), case["samples"])
        for suite, part in record["suites"].items()
        for case in part["cases"]
        if case.get("samples")
    }


def _machine_shift(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Return the logarithm of the change of the copy or the product, whichever changed more; 0 if a run has no limits."""
    shifts = [0.0]
    for name in ("copy", "product"):
        samples = [run["limits"][name] for run in (before, after)]
        if all(samples):
            shifts.append(math.log(min(samples[1]) / min(samples[0])))
    return max(shifts, key=abs)


def _notes(before: dict[str, Any], after: dict[str, Any], missing: set[Any], machine: float) -> Iterator[str]:
    for name, words in (("device", "devices"), ("settings", "settings")):
        if before[name] != after[name]:
            yield f"the {words} differ: {before[name]} and {after[name]}"
    if abs(machine) > LEAST_ERROR:
        yield (
            f"the machine changed between the runs: a copy or a matrix product takes {math.expm1(machine):+.0%} of its time; "
            "every case may differ by as much"
        )
    for record, word in ((before, "before"), (after, "after")):
        cores, load = record["machine"]["cores"], record["machine"]["load_average"]
        if cores and load > 0.5 * cores:
            yield f"the machine was busy when the run {word} began: load average {load:.1f} on {cores} cores"
        if not record["finished"]:
            yield f"the run {word} did not finish"
    if missing:
        yield f"{len(missing)} cases are in one of the runs only"
