"""`python -m benchmarks [NAME ...] [--quick]`: run benchmarks, print tables, write `benchmarks/results/NAME.json`."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from benchmarks.harness import RESULTS, machine

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: shows that it runs")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; expected some of {', '.join(NAMES)}")

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "worker.log").write_text("")
    facts = machine()
    print(json.dumps(facts, indent=1))
    if facts["load_average"] > 0.5 * facts["cores"]:
        print("note: something else is running here; trust the ratios only, or run again")
    for name in arguments.names or NAMES:
        (RESULTS / f"{name}.json").unlink(missing_ok=True)
        importlib.import_module(f"benchmarks.bench_{name}").main(quick=arguments.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
