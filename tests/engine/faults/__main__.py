"""Run seeds of the simulator of faults.

python -m tests.engine.faults SEED replays a seed and prints what happens; FIRST LAST runs a range and prints the failures.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import time
import traceback

from tests.engine.faults.simulate import Simulator, Wrong, simulator


def main() -> int:
    """Run the seeds; return 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.engine.faults", description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, nargs="?")
    parser.add_argument("--json", action="store_true", help="print counts and failures as one line of JSON")
    given = parser.parse_args()
    last = given.first if given.last is None else given.last
    failures, begun = [], time.monotonic()
    logging.disable(logging.WARNING)
    with simulator() as found:
        for seed in range(given.first, last + 1):
            lines = run(found, seed, failures)
            print(f"\r{seed}", end="", file=sys.stderr)
            if given.last is None:
                print(*lines, sep="\n")
    if given.json:
        counts = {"schedules": last - given.first + 1, "faults": found.done, "ends": found.ends}
        print(json.dumps(counts | {"failures": failures}))
    else:
        print(
            *failures,
            f"{last - given.first + 1} schedules in {time.monotonic() - begun:.0f} s, {len(failures)} failed",
            sep="\n",
        )
        print(dict(found.done), dict(found.ends), sep="\n")
    return int(bool(failures))


def run(found: Simulator, seed: int, failures: list[str]) -> list[str]:
    """Run a seed and add its failure to `failures`; return the lines about its attempts."""
    lines: list[str] = []
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            found.run(seed, lines.append)
    except Wrong as wrong:
        failures.append("\n".join((f"seed {seed}: {wrong}", *lines)))
        print(failures[-1], flush=True)
        if wrong.__cause__ is not None:
            lines += traceback.format_exception(wrong.__cause__)
    return lines


if __name__ == "__main__":
    sys.exit(main())
