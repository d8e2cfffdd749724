"""The long run of the fuzzer of files and options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from tests.soak.processes import calls, check

CASES, PART = 100_000, 5_000
"""Cases that are asked for, and those of one process."""


def run(seconds: float) -> Iterator[dict[str, Any]]:
    """Fuzz with one seed after the other until the cases are reached or the time is over."""
    if find_spec("tests.fuzz") is None:
        yield {"checks": [], "failures": ["there is no fuzzer"]}
        return
    done, failures = 0, []
    parts = (
        ["tests.fuzz", "--cases", str(PART), "--seed", str(seed), "--processes", "1"] for seed in range(CASES // PART)
    )
    for command, (code, out, err) in calls(parts, seconds):
        ended = re.search(r"^(\d+) faults$", out, re.M)
        done += PART if ended else 0
        if code or not ended:
            failures.append(_faults(out) if ended else f"{' '.join(command)}: exit code {code}\n{err[-400:]}")
        checks = [
            check("cases", done, CASES, at_least=True),
            check("runs with a traceback, a hang, too much memory, or an accepted mistake", len(failures), 0),
        ]
        yield {"checks": checks, "failures": failures}


def _faults(out: str) -> str:
    """Return what the fuzzer prints between its table and the number of faults."""
    lines = [line for line in out.splitlines() if line and not line.startswith("|")]
    return "\n".join(line[:400] for line in lines[:-1])
