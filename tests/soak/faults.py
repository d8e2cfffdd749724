"""Thousands of schedules of the simulator of faults."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.soak.processes import calls, check

SCHEDULES, MOST, PART = 2_000, 2_400, 100
"""Schedules that are asked for, those of a long run, and those of one process."""


def run(seconds: float) -> Iterator[dict[str, Any]]:
    """Run the seeds from 0 until the time is over, `MOST` at most."""
    done, failures = 0, []
    faults: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    parts = (["tests.engine.faults", str(first), str(first + PART - 1), "--json"] for first in range(0, MOST, PART))
    for command, (code, out, err) in calls(parts, seconds):
        lines = out.splitlines()
        if code in (0, 1) and lines:
            found = json.loads(lines[-1])
            done += found["schedules"]
            faults.update(found["faults"])
            ends.update(found["ends"])
            failures += found["failures"]
        else:
            failures.append(f"{' '.join(command)}: exit code {code}: {err[-400:]}")
        checks = [
            check("schedules", done, SCHEDULES, at_least=True),
            check("runs that ended with other bits, or could not be resumed", len(failures), 0),
        ]
        yield {"checks": checks, "failures": failures, "faults": _sorted(faults), "ends": _sorted(ends)}


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
