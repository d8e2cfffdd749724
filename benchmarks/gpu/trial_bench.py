"""Kernels in `rlhf_kernels.trials` next to those that they would replace: results first, then the time of both.

No device has timed these kernels when this file is written; `benchmarks/results/notes.md` predicts each time. The parts are in
the order of their predicted gain per second of this run. Legend: B sequences, T positions, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, microseconds, milliseconds, ratio
from benchmarks.gpu.cases import same_bits
from benchmarks.gpu.entries import Entry
from benchmarks.gpu.head_bench import FULL, TINY, make_batch, make_head, products, stepper
from benchmarks.gpu.timing import copies_to_fill_l2
from benchmarks.gpu.token_bench import make_rollout
from rlhf_kernels import gae, linear_ppo_loss
from rlhf_kernels.ops.head import Plan
from rlhf_kernels.trials import trial

Call = Callable[[], tuple[Tensor, ...]]


def compared(
    bench: Bench, name: str, tried: str, calls: Sequence[Call], bound: float, in_copies: float | None = None
) -> Iterator[Entry]:
    """Check that the trial `tried` gives the bits of the current kernels, twice, then time both.

    `bound` is in microseconds, or, if `in_copies` is a number of bytes, in multiples of the time to copy them.
    """
    expected = calls[0]()
    with trial(tried):
        yield Entry(f"{name}, {tried}: same bits", passed=all(same_bits(expected, calls[0]()) for _ in range(2)))
    current = bench.timer.replayed(calls)
    with trial(tried):
        seconds = bench.timer.replayed(calls)
    yield microseconds(f"{name}, current", current)
    if in_copies is None:
        yield microseconds(f"{name}, {tried}", seconds, bound=bound)
    else:
        yield microseconds(f"{name}, {tried}", seconds)
        share = ratio(seconds, bench.copy_seconds(in_copies))
        yield Entry(f"{name}, {tried} / moving {in_copies:.0f} bytes", share, bound=bound)
    yield Entry(f"{name}, {tried} / current", ratio(seconds, current), note="below 1: the trial is faster")


def split_gae(bench: Bench) -> Iterator[Entry]:
    """Several programs per row: 26 bytes per token in two launches, 17 in one."""
    b, t = bench.size((64, 131072), (1, 16384))
    sets = [make_rollout(bench, b, t) for _ in range(copies_to_fill_l2(17 * b * t, dry_run=bench.dry_run))]
    calls = [lambda x=x: tuple(gae(x["logprobs"], x["values"], x["mask"], backend="triton")) for x in sets]
    yield from compared(bench, f"gae {b}x{t}", "gae_split", calls, 70)


def half_logits(bench: Bench) -> Iterator[Entry]:
    """Logits in bf16: 6 instead of 10 bytes per logit in the epilogue, and half as many sums of dW."""
    n, h, v = bench.size(FULL, TINY)
    hidden, weight = make_head(bench, n, h, v)
    batch = make_batch(bench, n, v)
    chunk = min(n, Plan.of(n, v, torch.bfloat16, "triton", None, False).chunk)
    current = stepper(lambda: linear_ppo_loss(hidden, weight, *batch, backend="triton").loss, hidden, weight)

    def tried() -> None:
        with trial("half_logits"):
            current()

    floor = products(bench, hidden, weight, chunk, torch.float32)
    cases = {"three products": floor, "current": current, "half_logits": tried}
    seconds = bench.timer.alternate(cases, rounds=7)
    for name, found in seconds.items():
        yield milliseconds(f"linear_ppo_loss N={n}: {name}", found, f"H={h} V={v} bf16")
    share = ratio(seconds["half_logits"], seconds["three products"])
    yield Entry("linear_ppo_loss, half_logits / three products", share, bound=1.08, note=f"products: chunks of {chunk}")


PARTS = {
    "linear_ppo_loss with half logits": half_logits,
    "gae in two launches": split_gae,
}
