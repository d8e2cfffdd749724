"""`make soak`: faults, kills, growth of memory, and hostile input, in at most an hour.

    python -m tests.soak [--minutes M] [--only SECTION ...]

The minutes are divided among the sections. What is measured is written to benchmarks/results/reliability.json after every step,
so an interrupted call keeps it; sections that do not run keep their last result. `python -m docs.generate` writes the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from tests.soak import faults, fuzz, growth, kills

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"


@dataclass(frozen=True)
class Section:
    """A part of the soak test."""

    title: str
    run: Callable[[float], Iterator[dict[str, Any]]]
    """Yields the results so far, and the last time all of them; gets the seconds that it may take."""
    share: float
    """Share of the time."""


SECTIONS = {
    "faults": Section("Faults from a seed", faults.run, 0.33),
    "kills": Section("kill -9 at random times", kills.run, 0.33),
    "growth": Section("500 PPO updates", growth.run, 0.07),
    "fuzz": Section("Hostile input", fuzz.run, 0.27),
}
"""A section's results are a dictionary with `checks` (name, value, bound, met, unit and at_least) and `failures` (texts)."""


def main() -> int:
    """Run the sections; return 1 if a check is not met."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", choices=list(SECTIONS), action="append", default=[])
    given = parser.parse_args()
    chosen = given.only or list(SECTIONS)
    total = sum(SECTIONS[name].share for name in chosen)
    failed = 0
    for name in chosen:
        section, begun, found = SECTIONS[name], time.monotonic(), {}
        print(f"{section.title} ...", flush=True)
        for found in section.run(given.minutes * 60 * section.share / total):
            save(name, found | {"title": section.title, "seconds": round(time.monotonic() - begun)})
        for check in found["checks"]:
            failed += not check["met"]
            print(f"  {check['name']}: {check['value']}, {'met' if check['met'] else 'NOT met'}", flush=True)
        print(*found["failures"], sep="\n", flush=True)
    return int(failed > 0)


def save(name: str, found: dict[str, Any]) -> None:
    """Replace the results of a section in the report."""
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"sections": {}}
    report["machine"] = machine()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
    report["sections"][name] = found | {"date": date, "commit": commit.stdout.strip()}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
