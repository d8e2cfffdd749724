"""Time of `linear_ppo_loss` and `logits_ppo_loss`, forward and backward, against matrix products and memory traffic.

Legend: N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, milliseconds, ratio
from benchmarks.gpu.entries import Entry
from rlhf_kernels import linear_ppo_loss, logits_ppo_loss
from rlhf_kernels.ops.head import Plan, product

FULL, TINY = (8192, 4096, 128256), (24, 16, 160)
CLAIMED = {"Liger's RL loss": 24.9, "verl's RL loss": 50.9}
"""Milliseconds at 4096 tokens that peers claim for their losses; the step `peers` measures those that are installed."""


def make_head(bench: Bench, n: int, h: int, v: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Return hidden states (N, H) and weight (V, H), both leaves."""
    g = torch.Generator(bench.device).manual_seed(0)
    hidden = torch.randn(n, h, generator=g, device=bench.device)
    weight = torch.randn(v, h, generator=g, device=bench.device) / h**0.5
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def make_batch(bench: Bench, n: int, v: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids, old log-probs, advantages and mask, each (N,).

    Old log-probs of 0 are above every new one, so with positive advantages no row is clipped and each has a gradient.
    """
    g = torch.Generator(bench.device).manual_seed(1)
    ids = torch.randint(v, (n,), generator=g, device=bench.device)
    advantages = torch.rand(n, generator=g, device=bench.device) + 0.1
    return ids, torch.zeros(n, device=bench.device), advantages, torch.ones(n, dtype=torch.bool, device=bench.device)


def stepper(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], None]:
    """Return a step that drops the gradients of the leaves and runs forward and backward."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return step


def products(bench: Bench, hidden: Tensor, weight: Tensor, chunk: int, logits_dtype: torch.dtype) -> Callable[[], None]:
    """Return a step of only the three products of every chunk, with dW summed in float32."""
    rows, w = hidden.detach(), weight.detach()
    logits = torch.empty(chunk, len(w), dtype=logits_dtype, device=bench.device)
    dlogits = torch.randn(chunk, len(w), device=bench.device, dtype=torch.bfloat16)
    d_hidden = torch.empty(rows.shape, device=bench.device)
    d_weight = torch.empty(w.shape, device=bench.device)

    def step() -> None:
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            size = len(rows[part])
            product(rows[part], w.t(), logits[:size])
            product(dlogits[:size], w, d_hidden[part])
            product(dlogits[:size].t(), rows[part], d_weight, add=start > 0)

    return step


def linear_time(bench: Bench) -> Iterator[Entry]:
    """Compare the loss with its three products, with the case of half of the rows inactive, and both dtypes of the logits."""
    n, h, v = bench.size(FULL, TINY)
    hidden, weight = make_head(bench, n, h, v)
    ids, old, advantages, mask = make_batch(bench, n, v)
    half = advantages * (torch.arange(n, device=bench.device) % 2)
    chunk = min(n, Plan.of(n, v, torch.bfloat16, "triton", None, False).chunk)

    def ours(adv: Tensor, **options):
        return stepper(
            lambda: linear_ppo_loss(hidden, weight, ids, old, adv, mask, backend="triton", **options).loss,
            hidden,
            weight,
        )

    cases = {
        "three products, float32 logits": products(bench, hidden, weight, chunk, torch.float32),
        "three products, bf16 logits": products(bench, hidden, weight, chunk, torch.bfloat16),
        "ours": ours(advantages),
        "ours, compact, half inactive": ours(half, compact=True),
    }
    seconds = bench.timer.alternate(cases, rounds=7)
    for name, found in seconds.items():
        note = bench.multiplied(6 * n * v * h, found) if "half" not in name else ""
        yield milliseconds(f"linear_ppo_loss forward+backward: {name}", found, f"N={n} H={h} V={v} bf16{note}")
    floor, rounded, plain, compact = seconds.values()
    yield Entry("linear_ppo_loss / three products", ratio(plain, floor), bound=1.08, note=f"chunks of {chunk} rows")
    yield Entry("linear_ppo_loss half inactive, compact / none inactive", ratio(compact, plain), bound=0.75)
    yield Entry("float32 logits / bf16 logits, the three products", ratio(floor, rounded), note="what out_dtype costs")
    yield milliseconds("linear_ppo_loss forward+backward: host time of ours", bench.timer.on_host(cases["ours"]))


def linear_memory(bench: Bench) -> Iterator[Entry]:
    """Measure the workspace: peak memory above inputs, gradients and the float32 sum of dW."""
    n, h, v = bench.size(FULL, TINY)
    hidden, weight = make_head(bench, n, h, v)
    batch = make_batch(bench, n, v)
    step = stepper(lambda: linear_ppo_loss(hidden, weight, *batch, backend="triton").loss, hidden, weight)
    step()  # keeps what the first call compiles and caches out of the peak
    hidden.grad = weight.grad = None
    peak = bench.peak_bytes(step)
    known = 2 * (hidden.numel() + weight.numel()) + 4 * weight.numel()
    extra = None if peak is None else (peak - known) / 1e9
    yield Entry("linear_ppo_loss workspace", extra, "GB", bound=1.2, note="peak - gradients - float32 dW sum")


def linear_4096(bench: Bench) -> Iterator[Entry]:
    """Time the loss with value loss, entropy metric and clipping, at the size of the peers' claims."""
    n, h, v = bench.size((4096, 4096, 128256), TINY)
    hidden, weight = make_head(bench, n, h, v)
    batch = make_batch(bench, n, v)
    value_weight = torch.full((h,), 0.01, device=bench.device, dtype=torch.bfloat16).requires_grad_()
    extra = {
        "value_weight": value_weight,
        "old_values": torch.zeros(n, device=bench.device),
        "returns": torch.randn(n, device=bench.device),
    }
    leaves = hidden, weight, value_weight
    step = stepper(lambda: linear_ppo_loss(hidden, weight, *batch, backend="triton", **extra).loss, *leaves)
    seconds = bench.timer.once(step)
    name = f"linear_ppo_loss N={n} with value loss, entropy, clip"
    yield milliseconds(name, seconds, f"H={h} V={v} bf16{bench.multiplied(6 * n * v * h, seconds)}")
    for peer, bound in CLAIMED.items():
        yield milliseconds(f"{name}, next to the published time of {peer}", seconds, bound=bound)


def logits_level(bench: Bench) -> Iterator[Entry]:
    """Compare the loss with moving one read and one write of the logits (4NV bytes), and both passes (6NV bytes)."""
    n, v = bench.size((8192, 128256), (12, 300))
    batch = make_batch(bench, n, v)
    g = torch.Generator(bench.device).manual_seed(2)
    storage = torch.empty(n, v, dtype=torch.bfloat16, device=bench.device)

    for backend in bench.backends("logits_ppo_loss"):
        for inplace in (False, True):

            def step(backend: str = backend, inplace: bool = inplace) -> None:
                logits = storage.detach().requires_grad_()
                logits_ppo_loss(logits, *batch, inplace=inplace, backend=backend).loss.backward()

            storage.normal_(generator=g)  # inplace overwrites the logits with their gradients
            seconds = bench.timer.once(step)
            name = f"logits_ppo_loss forward+backward, {backend}{', in place' * inplace}"
            if not inplace:
                yield milliseconds(f"{name}: host time", bench.timer.on_host(step))
            yield milliseconds(name, seconds, f"N={n} V={v} bf16, 6NV bytes{bench.moved(6 * n * v, seconds)}")
            if backend == "cuda":
                floor = bench.copy_seconds(4 * n * v)
                yield Entry(f"{name} / moving 4NV bytes", ratio(seconds, floor), bound=1.2)
            elif not inplace:
                floor = bench.copy_seconds(6 * n * v)
                yield Entry(f"moving 6NV bytes / {name}", ratio(floor, seconds), bound=0.85, at_least=True)
    if bench.why_no_cuda("logits_ppo_loss"):
        yield Entry("logits_ppo_loss, cuda", bound=1.2, skipped=bench.why_no_cuda("logits_ppo_loss"))


PARTS = {
    "linear_ppo_loss time": linear_time,
    "linear_ppo_loss workspace": linear_memory,
    "linear_ppo_loss at 4096 tokens": linear_4096,
    "logits_ppo_loss": logits_level,
}
