"""Time of the memory-bound ops: GAE, rollout advantages, log-probs of logits, the sampler and paged attention.

Legend: B sequences, T positions, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.bench import Bench, microseconds, milliseconds, ratio
from benchmarks.gpu.entries import Entry
from benchmarks.gpu.timing import copies_to_fill_l2
from rlhf_kernels import gae, paged_attention, rollout_advantages, sample_tokens, token_logprobs

GAE_BOUNDS = {(128, 4096): 8, (64, 131072): 70}
"""(B, T) -> bound of the device time in microseconds."""


def make_rollout(bench: Bench, b: int, t: int) -> dict[str, torch.Tensor]:
    """Return responses with different lengths."""
    device = bench.device
    lengths = torch.randint(t // 2, t + 1, (b, 1), device=device)
    logprobs = -torch.rand(b, t, device=device)
    return {
        "scores": torch.randn(b, device=device),
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.1 * torch.randn(b, t, device=device),
        "values": torch.randn(b, t, device=device),
        "mask": torch.arange(t, device=device) < lengths,
    }


def gae_time(bench: Bench) -> Iterator[Entry]:
    """Measure device time with tensors that are not in the L2 cache; a call moves 17 bytes per element."""
    for (b, t), bound in bench.size(GAE_BOUNDS, {(3, 40): 8, (2, 70): 70}).items():
        moved = 17 * b * t
        sets = [make_rollout(bench, b, t) for _ in range(copies_to_fill_l2(moved, dry_run=bench.dry_run))]
        for backend in bench.backends("gae"):
            calls = [
                lambda x=x, backend=backend: gae(x["logprobs"], x["values"], x["mask"], backend=backend) for x in sets
            ]
            seconds = bench.timer.replayed(calls)
            yield microseconds(
                f"gae {b}x{t}, {backend}", seconds, f"17 bytes an element{bench.moved(moved, seconds)}", bound=bound
            )
    if bench.why_no_cuda("gae"):
        yield Entry("gae, cuda", skipped=bench.why_no_cuda("gae"))


def rollout_time(bench: Bench) -> Iterator[Entry]:
    """Compare with moving 29 bytes per element, 37 with whitening, at the copy's rate, and with one block copy of as many."""
    b, t = bench.size((512, 8192), (3, 40))
    for whiten, count in ((False, 29), (True, 37)):
        moved = count * b * t
        sets = [make_rollout(bench, b, t) for _ in range(copies_to_fill_l2(moved, dry_run=bench.dry_run))]
        blocks = [torch.ones(moved, dtype=torch.uint8, device=bench.device) for _ in range(4)]
        block = bench.timer.once(lambda blocks=blocks: [blocks[i].copy_(blocks[i + 1]) for i in (0, 2)], rounds=20)
        block = block and block / 2
        for backend in bench.backends("rollout_advantages"):
            calls = [
                lambda x=x, backend=backend, whiten=whiten: rollout_advantages(
                    **x, kl_coef=0.05, whiten_advantages=whiten, backend=backend
                )
                for x in sets
            ]
            seconds = bench.timer.replayed(calls)
            name = f"rollout_advantages {b}x{t}{', whitened' * whiten}, {backend}"
            yield microseconds(name, seconds, f"{count} bytes an element{bench.moved(moved, seconds)}")
            share = ratio(seconds, bench.copy_seconds(moved))
            yield Entry(f"{name} / moving {count} bytes an element", share, bound=1.25)
            note = f"a copy that reads {count} bytes an element and writes as many"
            yield Entry(f"{name} / block copy", ratio(seconds, block), note=note)
    if bench.why_no_cuda("rollout_advantages"):
        yield Entry("rollout_advantages, cuda", skipped=bench.why_no_cuda("rollout_advantages"))


def logprobs_time(bench: Bench) -> Iterator[Entry]:
    """Measure forward, which reads the logits once, and forward+backward, which reads them twice and writes them once."""
    n, v = bench.size((8192, 128256), (12, 300))
    ids = torch.randint(v, (n,), device=bench.device)
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(n, v, device=bench.device, dtype=dtype).requires_grad_()
        size, kind = dtype.itemsize, str(dtype).removeprefix("torch.")

        def forward(logits: torch.Tensor = logits) -> None:
            with torch.no_grad():
                token_logprobs(logits, ids, entropy=True, backend="triton")

        def both(logits: torch.Tensor = logits) -> None:
            logits.grad = None
            token_logprobs(logits, ids, entropy=True, backend="triton").logprobs.sum().backward()

        for name, call, passes in (("forward", forward, 1), ("forward+backward", both, 3)):
            seconds = bench.timer.once(call)
            note = f"N={n} V={v}{bench.moved(passes * size * n * v, seconds)}"
            yield milliseconds(f"token_logprobs {name}, {kind}", seconds, note)
        del logits


def sampler_time(bench: Bench) -> Iterator[Entry]:
    b, v = bench.size((64, 128256), (3, 300))
    counters = torch.arange(b, device=bench.device), torch.arange(b, device=bench.device)
    sets = [
        torch.randn(b, v, device=bench.device, dtype=torch.bfloat16)
        for _ in range(copies_to_fill_l2(2 * b * v, dry_run=bench.dry_run))
    ]
    filters = {
        "no filter": {},
        "top-k 50": {"top_k": 50},
        "top-p 0.9": {"top_p": 0.9},
        "min-p 0.05": {"min_p": 0.05},
        "top-k 50, top-p 0.9, min-p 0.05": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
    }
    for name, options in filters.items():
        calls = [
            lambda x=x, options=options: sample_tokens(
                x, seed=1, sequence=counters[0], position=counters[1], backend="triton", **options
            )
            for x in sets
        ]
        seconds = bench.timer.replayed(calls)
        note = f"one read of the logits{bench.moved(2 * b * v, seconds)}"
        yield microseconds(f"sample_tokens {b}x{v} bf16, {name}", seconds, note)


DECODE = {
    "Llama 3 8B": (64, 1536, 32, 8, 128),
    "Qwen2.5 1.5B": (64, 1536, 12, 2, 128),
    "one long": (1, 131072, 32, 8, 128),
}
"""Case -> (sequences, mean length, heads, groups, head size)."""


def attention_time(bench: Bench) -> Iterator[Entry]:
    """Measure a decode step of one layer, which reads keys and values of every sequence once, from pages in random order."""
    for name, (b, t, heads, groups, size) in bench.size(DECODE, {"tiny": (2, 24, 4, 2, 16)}).items():
        lengths = torch.randint(t // 2, t * 3 // 2, (b,), dtype=torch.int32, device=bench.device)
        places = -(-int(lengths.max()) // 64)
        table = torch.randperm(b * places, device=bench.device).int().reshape(b, places)
        moved = 4 * int(lengths.sum()) * groups * size
        sets = [
            torch.randn(2, b * places, 64, groups, size, device=bench.device, dtype=torch.bfloat16)
            for _ in range(copies_to_fill_l2(moved, dry_run=bench.dry_run))
        ]
        q = torch.randn(b, heads, size, device=bench.device, dtype=torch.bfloat16)
        calls = [partial(paged_attention, q, *x, table, lengths, backend="triton") for x in sets]
        seconds = bench.timer.replayed(calls)
        note = f"B={b} mean T={t}, {heads} heads, {groups} groups of {size}{bench.moved(moved, seconds)}"
        yield microseconds(f"paged_attention bf16, {name}", seconds, note)


PARTS = {
    "gae": gae_time,
    "rollout_advantages": rollout_time,
    "token_logprobs": logprobs_time,
    "sample_tokens": sampler_time,
    "paged_attention": attention_time,
}
