"""`python -m benchmarks.peer_agreement [PEER ...]`: compare every adapter with its original and print a Markdown table.

Per function, the table has the largest difference of any tensor, gradients included, over all options and batches (max |ours
- theirs| / max |theirs|). On a larger batch, it has the time of a call with its backward pass and the peak of allocated
bytes, both as ours divided by theirs. Bytes are those of torch's allocator, counted by torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.agreement import cases
from benchmarks.agreement.case import LIMIT, Batch, Case, batch, compare
from benchmarks.agreement.originals import Missing


@dataclass(frozen=True)
class Line:
    """One row of the table: one function of one peer."""

    peer: str
    release: str
    function: str
    difference: float
    seconds: float
    """Ours divided by theirs."""
    bytes: float
    """Ours divided by theirs."""


def measure(group: Sequence[Case]) -> Line:
    """Measure all cases of one function."""
    worst = max(d.relative for case in group for kind in case.batches for d in compare(case, kind))
    case = group[0]
    inputs = batch("full", **case.sizes)
    seconds = _seconds(case, inputs)
    peaks = [_peak_bytes(case, side, inputs) for side in (case.ours, case.theirs)]
    return Line(case.peer, case.release, case.function, worst, seconds, peaks[0] / max(peaks[1], 1))


def _call(case: Case, side, inputs: Batch) -> None:
    result = case.call(side, inputs)
    if case.wrt:
        first = result if isinstance(result, torch.Tensor) else next(x for x in result if isinstance(x, torch.Tensor))
        first.sum().backward()


def _seconds(case: Case, inputs: Batch, rounds: int = 7) -> float:
    """Return the median over rounds of our time divided by theirs in the same round."""
    ratios = []
    for index in range(rounds + 1):
        took = []
        for side in (case.ours, case.theirs):
            fresh = inputs.require(case.wrt)
            start = time.perf_counter()
            _call(case, side, fresh)
            took.append(time.perf_counter() - start)
        ratios += [took[0] / took[1]] if index else []
    return statistics.median(ratios)


def _peak_bytes(case: Case, side, inputs: Batch) -> int:
    fresh = inputs.require(case.wrt)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        _call(case, side, fresh)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def groups(peer: str) -> Iterator[list[Case]]:
    """Yield the cases of a peer, grouped by release and function."""
    found: dict[tuple[str, str], list[Case]] = {}
    for case in cases.PEERS[peer]():
        found.setdefault((case.release, case.function), []).append(case)
    yield from found.values()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_agreement", description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"some of {', '.join(cases.PEERS)}; all by default")
    chosen = parser.parse_args().peers or list(cases.PEERS)
    if unknown := set(chosen) - set(cases.PEERS):
        parser.error(f"unknown peer {', '.join(sorted(unknown))}; expected some of {', '.join(cases.PEERS)}")
    print("| peer | version | function | largest difference | time | memory |\n|---|---|---|---|---|---|")
    worst = 0.0
    for peer in chosen:
        try:
            for group in groups(peer):
                x = measure(group)
                worst = max(worst, x.difference)
                ratios = f"{x.seconds:.2f}x | {x.bytes:.2f}x"
                print(f"| {x.peer} | {x.release} | `{x.function}` | {x.difference:.1e} | {ratios} |", flush=True)
        except Missing as reason:
            print(f"| {peer} | | not available: {reason} | | | |")
    print(f"\nlargest difference {worst:.1e}, limit {LIMIT:g}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
