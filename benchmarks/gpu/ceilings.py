"""Ceilings, measured in the same run: the two rates of which other figures are fractions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.entries import COPY, MATMUL, Entry


def copy_bandwidth(bench: Bench) -> Iterator[Entry]:
    """Measure a copy of one block to a different one; read and written bytes both count."""
    n = bench.size(4 * 2**30, 2**16)
    source = torch.ones(n, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.timer.once(lambda: target.copy_(source), rounds=20)
    yield Entry(COPY, seconds and 2 * n / seconds / 1e12, "TB/s", note=f"{n} bytes read and as many written")


def matrix_rate(bench: Bench) -> Iterator[Entry]:
    """Measure a bf16 product of random factors: with zeros the device draws less power and clocks higher."""
    n = bench.size(8192, 64)
    a, b = (torch.randn(n, n, device=bench.device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = bench.timer.once(lambda: torch.mm(a, b, out=out), rounds=20, warmup=5)
    yield Entry(MATMUL, seconds and 2 * n**3 / seconds / 1e12, "TFLOP/s", note=f"{n}x{n}x{n}, random data")


PARTS = {COPY: copy_bandwidth, MATMUL: matrix_rate}
