"""Run the fuzzer: `python -m tests.fuzz --cases 100000 --seed 0`. A fault is printed with the command that repeats it."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random

from tests.fuzz.harness import run_case
from tests.fuzz.kinds import KINDS, fuzz, start


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=2_000, help="number of cases over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only this kind; repeatable")
    parser.add_argument("--case", type=int, help="run only this case of the kind, and print its content")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.case is not None:
        return replay(given.kind[0], given.seed, given.case)
    report = fuzz(given.cases, given.seed, given.kind or tuple(KINDS), processes=given.processes)
    print(report.table())
    print(*report.faults, f"{len(report.faults)} faults", sep="\n")
    return bool(report.faults)


def replay(name: str, seed: int, number: int) -> int:
    """Run one case and print its content; return 1 for a fault."""
    with tempfile.TemporaryDirectory() as folder:
        kind = start(name, Path(folder))
        case = kind.case(Random(f"{name} {seed} {number}"))
        for path, content in case.files.items():
            shown = repr(content)
            print(f"{path}: {shown if len(shown) < 20_000 else shown[:20_000] + ' ...'}")
        for override in case.overrides:
            print(f"--set {override[:5_000]!a}")
        fault = run_case(kind, seed, number)
        print(fault or ("accepted" if kind.accepted else "refused"))
    return fault is not None


if __name__ == "__main__":
    sys.exit(main())
