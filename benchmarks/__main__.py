"""`python -m benchmarks [NAME ...] [--quick]`: run benchmarks, print tables, write `benchmarks/results/NAME.json`."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, machine

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes and few rounds, to check that a benchmark runs"
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; expected some of {', '.join(NAMES)}")

    names = arguments.names or NAMES
    # One process per benchmark: a failure does not stop the others, and none inherits threads or imports.
    if len(names) > 1:
        flags = ["--quick"] * arguments.quick
        return max([subprocess.call([sys.executable, "-m", "benchmarks", name, *flags]) for name in names])
    run(names[0], quick=arguments.quick)
    return 0


def run(name: str, *, quick: bool) -> None:
    """Delete the results file of a benchmark, run it, and print how many bounds it met."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").unlink(missing_ok=True)
    facts = machine()
    versions = ", ".join(f"{package} {version}" for package, version in facts.pop("versions").items())
    print(f"\n# {name}\n" + ", ".join(f"{key} {value}" for key, value in facts.items()) + f"\n{versions}")
    if facts["load_average"] > 0.5 * facts["cores"]:
        print("note: the load average is high; run again on an idle machine before you quote these figures")
    importlib.import_module(f"benchmarks.bench_{name}").main(quick=quick)
    checks = [
        check["met"]
        for group in json.loads((RESULTS / f"{name}.json").read_text())["groups"]
        for check in group["checks"]
    ]
    print(f"\n{name}: {sum(checks)} of {len(checks)} bounds met")


if __name__ == "__main__":
    raise SystemExit(main())
