"""Compare the speed of two checkouts of this repository, whose steps run in alternation.

    python -m benchmarks.commits OLD NEW [--rounds 8] [--threads 2] [NAME ...]

Each checkout runs in a separate process with PYTHONPATH set to it, so the extension must be built in both. A round is one
step of OLD and one of NEW, in alternating order. The result is the median over rounds of NEW's seconds divided by OLD's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def ppo_step() -> Callable[[], object]:
    """Return one PPO update of `benchmarks/bench_ppo_step.py` with `TOKENS[32]` tokens per pass."""
    from benchmarks.bench_ppo_step import BATCH, MODEL, TOKENS, make_trainer

    return make_trainer(MODEL, BATCH | {"tokens": TOKENS[32]}).step


def rollout() -> Callable[[], object]:
    """Return a call that samples responses of equal length to the 64 prompts of `benchmarks/bench_rollout.py`."""
    from benchmarks.bench_rollout import MODEL, OURS, cases

    return cases(MODEL, geometric=False)[OURS]


def linear_ppo_loss() -> Callable[[], object]:
    """Return `linear_ppo_loss` of `benchmarks/bench_linear_ppo_loss.py` in float32, forward and backward."""
    import torch

    from benchmarks.bench_linear_ppo_loss import FULL, make_batch, ours

    hidden, weight, batch = make_batch(**FULL, dtype=torch.float32)
    call = ours("ours", hidden, weight, batch)

    def step() -> None:
        hidden.grad = weight.grad = None
        call().backward()

    return step


CASES = {case.__name__: case for case in (ppo_step, rollout, linear_ppo_loss)}


def worker(name: str, threads: int) -> None:
    """Run one step per line of standard input and print its seconds."""
    import torch

    torch.set_num_threads(threads)
    step = CASES[name]()
    step()  # a warm-up
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)


def compare(old: Path, new: Path, name: str, rounds: int, threads: int) -> None:
    """Print the median seconds of both checkouts and the median of their ratio."""
    started = [start(tree, name, threads) for tree in (old, new)]
    seconds: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            process = started[which]
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[which].append(float(process.stdout.readline()))
    for process in started:
        process.stdin.close()
        process.wait()
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    medians = [statistics.median(times) for times in seconds]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(
        f"{name:16} {medians[0]:8.3f} s {medians[1]:8.3f} s  ratio {statistics.median(ratios):.3f} ({spread}, {rounds} rounds)"
    )


def start(tree: Path, name: str, threads: int) -> subprocess.Popen[str]:
    """Start a worker in a checkout and wait until it is ready."""
    environment = os.environ | {"PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--threads", str(threads)]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"the benchmark {name} does not start in {tree}; check that the extension is built there")
    return process


def main() -> None:
    """Parse the command line and run the comparison, or a worker of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trees", nargs="*", help="the checkouts OLD and NEW, then names of cases; all by default")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=CASES)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker, given.threads)
        return
    if len(given.trees) < 2 or not set(given.trees[2:]) <= CASES.keys():
        parser.error(f"give two checkouts, OLD and NEW, and optionally some of {', '.join(CASES)}")
    for name in given.trees[2:] or CASES:
        compare(Path(given.trees[0]), Path(given.trees[1]), name, given.rounds, given.threads)


if __name__ == "__main__":
    main()
