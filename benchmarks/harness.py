"""Checks with bounds and the results files of `python -m benchmarks`, on the timers and processes of `rlhf_engine.bench`.

A ratio is reliable because its two cases ran in alternation, a fraction of a second apart, and not on an idle machine.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rlhf_engine.bench import process
from rlhf_engine.bench.machine import machine as facts_of
from rlhf_engine.bench.process import MB, Row, Session, alternate_workers
from rlhf_engine.bench.report import duration
from rlhf_engine.bench.timing import Timer

__all__ = ["MB", "Check", "Row", "Session", "Worker", "alternate", "alternate_workers", "machine", "ratio", "report"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "rlhf-kernels", "trl", "liger-kernel", "cut-cross-entropy", "numpy")


@dataclass(frozen=True)
class Check:
    """A measured value, usually a ratio, and its bound."""

    name: str
    value: float | None
    """None if one of its cases has no figure; the bound is then not met."""
    bound: float
    at_least: bool = False
    """True: the bound is a minimum; False: it is a maximum."""

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Worker(process.Worker):
    """A case in a process that can import `benchmarks`."""

    FOLDER = Path(__file__).parents[1]


def alternate(cases: dict[str, Callable[[], object]], *, rounds: int, round_seconds: float = 0.05) -> list[Row]:
    """Time the cases in alternation for `rounds` rounds; a sample is the mean of the calls that fill `round_seconds`."""
    samples = Timer(torch.device("cpu")).alternate(cases, rounds=rounds, seconds=round_seconds)
    return [Row(name, found) for name, found in samples.items()]


def machine() -> dict:
    """Return versions, processor, threads and load, which a reader needs to interpret a figure."""
    return facts_of(PACKAGES)


def ratio(row: Row, base: Row) -> float | None:
    """Return the median over rounds of `row`'s seconds divided by `base`'s in the same round, so a slowdown affects both."""
    if row.error or base.error:
        return None
    # A slow case has only its first round.
    return statistics.median(a / b for a, b in zip(row.seconds, base.seconds, strict=False))


def report(
    name: str, title: str, rows: Sequence[Row], *, floor: Row | None = None, checks: Sequence[Check] = ()
) -> None:
    """Print the table of one group of rows and append it to `results/<name>.json`."""
    print(f"\n## {title}")
    memory = any(row.extra_mb is not None for row in rows)
    print(f"{'':44}{'best':>11}{'median':>11}" + f"{'x floor':>9}" * bool(floor) + f"{'extra MB':>10}" * memory)
    for row in rows:
        if row.error:
            print(f"{row.name:44}{row.error}")
            continue
        line = f"{row.name:44}{duration(row.best):>11}{duration(row.median):>11}"
        line += f"{ratio(row, floor):9.2f}" if floor else ""
        line += f"{row.extra_mb:10.0f}" if row.extra_mb is not None else ""
        print(line + ("  " + row.note if row.note else ""))
    for check in checks:
        sign = ">=" if check.at_least else "<="
        value = "not measured" if check.value is None else f"{check.value:.3g}"
        print(f"  {'ok  ' if check.met else 'MISS'} {check.name}: {value} ({sign} {check.bound:g})")
    path = RESULTS / f"{name}.json"
    groups = json.loads(path.read_text())["groups"] if path.exists() else []
    groups.append(
        {
            "title": title,
            "floor": floor.name if floor else None,
            "rows": [_record(row, floor) for row in rows],
            "checks": [asdict(check) | {"met": check.met} for check in checks],
        }
    )
    path.write_text(json.dumps({"machine": machine(), "groups": groups}, indent=1) + "\n")


def _record(row: Row, floor: Row | None) -> dict:
    if row.error:
        return {"name": row.name, "error": row.error}
    relative = {"ratio_to_floor": ratio(row, floor)} if floor else {}
    return asdict(row) | {"best": row.best, "median": row.median} | relative
