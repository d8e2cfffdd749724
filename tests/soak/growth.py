"""Memory, descriptors and threads of a process over many PPO updates.

`python -m tests.soak.growth UPDATES` trains in this process and prints a line for every tenth update.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.soak.processes import call, check

UPDATES, FIRST = 500, 100
"""Updates, and the number of those that may still allocate what later ones reuse."""
SLOPE = 16.0
"""Largest growth of the resident memory, in KiB per update. Runs in float32 had 3 to 10: responses vary in length."""


def run(seconds: float) -> Iterator[dict[str, Any]]:
    """Train `UPDATES` updates in a process."""
    code, out, err = call(["tests.soak.growth", str(UPDATES)], 3 * seconds)
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    yield measured(rows, f"exit code {code}: {err[-400:]}" if code else None)


def measured(rows: list[list[int]], failure: str | None) -> dict[str, Any]:
    """Return the checks of rows of updates, resident KiB, descriptors and threads."""
    late = [row for row in rows if row[0] > FIRST]
    failures = [] if failure is None else [failure]
    if len(late) < 3:
        return {"checks": [], "failures": failures or ["too few updates"]}
    slope = _slope([(row[0], row[1]) for row in late])
    open_files, threads = ({row[column] for row in late} for column in (2, 3))
    checks = [
        check("updates", rows[-1][0], UPDATES, at_least=True),
        check(f"growth of resident memory after update {FIRST}", round(slope, 2), SLOPE, unit="KiB per update"),
        check("open descriptors: largest - smallest", max(open_files) - min(open_files), 0),
        check("threads: largest - smallest", max(threads) - min(threads), 0),
    ]
    return {"checks": checks, "failures": failures, "rows": rows}


def _slope(points: list[tuple[int, int]]) -> float:
    """Return the slope of the line with the smallest squared error."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def train(updates: int) -> None:
    """Train and print a line for every tenth update."""
    from rlhf_engine.ppo.callbacks import Callback
    from rlhf_engine.recipes import run_ppo
    from tests.engine.faults.runs import CASES, config_of, prepare

    class Meter(Callback):
        def on_update(self, trainer, log):
            if trainer.updates_done % 10 == 0:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
                row = [trainer.updates_done, resident, len(os.listdir("/proc/self/fd")), threading.active_count()]
                print(json.dumps(row), flush=True)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="rlhf-growth-") as name:
        folder = Path(name)
        prepare(folder)
        settings = [f"ppo.updates={updates}", "ppo.checkpoint_every=50"]
        run_ppo(config_of(folder, CASES["ppo"], folder / "out", *settings), callbacks=[Meter()])


if __name__ == "__main__":
    train(int(sys.argv[1]))
