"""One group of the suite in a separate process: `python -m benchmarks.gpu.worker GROUP`, run by `gpu_suite`.

After a kernel fault, a process can no longer use the device, so a fault may lose entries of its group but of no other. Each
entry is sent as a line of JSON as soon as it is known.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import time
from collections.abc import Mapping

import torch

from benchmarks.gpu.bench import Bench, Part
from benchmarks.gpu.cases import cases
from benchmarks.gpu.correctness import FAILURES, reason
from benchmarks.gpu.entries import Entry
from benchmarks.gpu.interpreter import speed_up_interpreter
from benchmarks.gpu.timing import Timer
from benchmarks.harness import Session

GROUPS = {
    "correctness": "correctness",
    "ceilings": "ceilings",
    "trials": "trial_bench",
    "heads": "head_bench",
    "tokens": "token_bench",
    "peers": "peer_bench",
    "engine": "engine_bench",
}
"""Name of a group -> the module whose `PARTS` it runs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=[*GROUPS, "sanitize"])
    parser.add_argument(
        "--seconds", type=float, required=True, help="time limit; parts that would begin later are skipped"
    )
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--copy-rate", type=float, help="measured copy rate, in bytes per second")
    parser.add_argument("--matmul-rate", type=float, help="measured rate of matrix products, in FLOPs per second")
    options = parser.parse_args()
    dry_run = options.dry_run
    if dry_run:
        speed_up_interpreter()
    device = torch.device("cpu" if dry_run else "cuda")
    bench = Bench(device, dry_run, Timer(dry_run=dry_run), options.copy_rate, options.matmul_rate)
    if options.group == "sanitize":
        sanitize(bench)
        return
    session = Session()
    parts: Mapping[str, Part] = importlib.import_module(f"benchmarks.gpu.{GROUPS[options.group]}").PARTS
    deadline = time.monotonic() + options.seconds
    for name, part in parts.items():
        if time.monotonic() > deadline:
            session.send(**Entry(name, skipped="the step's time was used up by the parts before it").record())
            continue
        for entry in entries(name, part, bench):
            session.send(**entry.record())
    session.send(done=True)


def entries(name: str, part: Part, bench: Bench):
    """Yield the entries of a part; an error that it raises becomes the last entry."""
    try:
        yield from part(bench)
    except FAILURES as error:
        yield Entry(name, error=reason(error))
    if bench.device.type == "cuda":
        gc.collect()  # a trainer is part of reference cycles
        torch.cuda.empty_cache()


def sanitize(bench: Bench) -> None:
    """Run every case once under compute-sanitizer, without checking results.

    The ops on hidden states are skipped: they add only the vendor's matrix products to the kernels of the ops on logits, and
    products are slow under the sanitizer.
    """
    for name, call in cases(bench.device, bench.backends).items():
        if not name.startswith("linear_"):
            print(name, flush=True)
            call()
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
