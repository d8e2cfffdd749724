"""One group of the suite in a process of its own: `python -m benchmarks.gpu.worker GROUP`, run by `gpu_suite`.

A kernel that faults leaves its process without a device, so a group may lose its own entries but no other's. Entries go
out as lines of JSON, each as soon as it is known.
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
from benchmarks.gpu.interpreter import patch_language_once_per_launch
from benchmarks.gpu.timing import Timer
from benchmarks.harness import Session

GROUPS = {
    "correctness": "correctness",
    "ceilings": "ceilings",
    "heads": "head_bench",
    "tokens": "token_bench",
    "peers": "peer_bench",
    "engine": "engine_bench",
}
"""Name of each group, and the module whose PARTS it runs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=[*GROUPS, "sanitize"])
    parser.add_argument("--seconds", type=float, required=True, help="parts that would begin later are skipped")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--copy-rate", type=float, help="bytes a second, measured before")
    parser.add_argument("--matmul-rate", type=float, help="FLOPs a second, measured before")
    options = parser.parse_args()
    dry_run = options.dry_run
    if dry_run:
        patch_language_once_per_launch()
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
    """Those that the part makes; what it raises becomes the last of them."""
    try:
        yield from part(bench)
    except FAILURES as error:
        yield Entry(name, error=reason(error))
    if bench.device.type == "cuda":
        gc.collect()  # a trainer lies in cycles
        torch.cuda.empty_cache()


def sanitize(bench: Bench) -> None:
    """Every case once, for compute-sanitizer to watch; results are of no interest.

    The ops on hidden states add nothing but the vendor's products to the kernels of those on logits, and products are slow
    to watch.
    """
    for name, call in cases(bench.device, bench.backends).items():
        if not name.startswith("linear_"):
            print(name, flush=True)
            call()
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
