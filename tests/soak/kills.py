"""Kills of every stage at random times."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.soak.processes import calls, check

PPO = ("ppo", "ppo, adaptive KL, average", "ppo, pretraining loss", "ppo, adapters", "ppo, state in host memory",
       "ppo, state in 8 bits")  # fmt: skip
CASES = {"ppo": PPO, "sft": ("sft",), "rm": ("rm",), "iterate": ("iterate",), "generate": ("generate",)}
"""Stage -> runs of the simulator of faults."""
KILLS = {"ppo": 102, "sft": 20, "rm": 20, "iterate": 20, "generate": 20}
"""Kills that are asked for, divided among the runs of a stage."""
TRIALS, PER_TRIAL = 40, 4
"""Most trials of a run, and most kills of a trial."""


def run(seconds: float) -> Iterator[dict[str, Any]]:
    """Kill every run until the kills are reached; begin no further run after so many `seconds`."""
    kills, failures = dict.fromkeys(CASES, 0), []
    counts = {"runs": 0, "continued from a checkpoint": 0, "continued in a copied folder": 0}
    stage_of = {name: stage for stage, names in CASES.items() for name in names}
    with tempfile.TemporaryDirectory(prefix="rlhf-kills-") as folder:
        for command, (code, out, err) in calls(_commands(folder), seconds):
            name = command[2]
            found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            kills[stage_of[name]] += sum(one["kills"] for one in found)
            counts["runs"] += len(found)
            counts["continued from a checkpoint"] += sum(one["continued"] for one in found)
            counts["continued in a copied folder"] += sum(one["copied"] for one in found)
            failures += [f"{name}: {one['difference']}" for one in found if one["difference"] is not None]
            if code:
                failures.append(f"{name}: exit code {code}: {err[-400:]}")
            checks = [
                check(f"kills of {stage}", kills[stage], wanted, at_least=True) for stage, wanted in KILLS.items()
            ]
            checks.append(check("runs that ended with other bits, or did not end", len(failures), 0))
            yield {"checks": checks, "failures": failures, "counts": counts}


def _commands(folder: str) -> Iterator[list[str]]:
    for stage, names in CASES.items():
        options = ["--instants", "--until", str(KILLS[stage] // len(names)), "--trials", str(TRIALS)]
        for number, name in enumerate(names):
            yield [
                "tests.engine.helpers.killed",
                f"{folder}/{stage}{number}",
                name,
                *options,
                "--kills",
                str(PER_TRIAL),
            ]
