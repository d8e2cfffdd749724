"""Time and memory of our ops and of those of the peers that can be imported.

Legend: B sequences, T positions, N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, milliseconds
from benchmarks.gpu.correctness import FAILURES, reason
from benchmarks.gpu.entries import HEAD_PEERS, Entry
from benchmarks.gpu.head_bench import make_batch, make_head, stepper
from benchmarks.peers.gae_loop import gae_loop
from benchmarks.peers.policy_losses import CLIPRANGE, COMPILING, PEERS, Batch, Loss, clipped_surrogate
from rlhf_kernels import linear_ppo_loss, logits_ppo_loss


def cut_cross_entropy() -> Loss:
    """Return a loss with Apple's cut-cross-entropy and its GPU kernel."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        return clipped_surrogate(-linear_cross_entropy(hidden, weight, batch.ids, reduction="none", impl="cce"), batch)

    return loss


def verl() -> Loss:
    """Return a loss with verl's fused kernel, which computes log-probs and entropy from hidden states."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        logprobs, _ = linear_cross_entropy(hidden.flatten(0, 1), weight, batch.ids.flatten(), 1.0, "none")
        return clipped_surrogate(logprobs.view_as(batch.ids), batch)

    return loss


def ours() -> Loss:
    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        return linear_ppo_loss(hidden, weight, *batch, cliprange=CLIPRANGE, backend="triton").loss

    return loss


DEVICE_ONLY = (*COMPILING, "cut-cross-entropy", "verl")
"""Peers that a dry run skips, because it runs no compiler and no third-party kernel."""


def head_peer(name: str, make: Callable[[], Loss], bench: Bench) -> Iterator[Entry]:
    """Measure a loss from hidden states: time, and peak memory above inputs. A missing package is recorded as skipped."""
    n, h, v = bench.size(HEAD_PEERS, (256, 16, 160))
    title = f"{name}, N={n}"
    if bench.dry_run and name in DEVICE_ONLY:
        yield Entry(title, skipped="a dry run runs no compiler and no third-party kernel", note="peer")
        return
    hidden, weight = make_head(bench, n, h, v)
    batch = Batch(*(x.view(-1, 128) for x in make_batch(bench, n, v)))
    # The same hidden states for every peer, in the shape of sequences.
    shaped = hidden.detach().view(-1, 128, h).requires_grad_()
    try:
        loss = make()
        step = stepper(lambda: loss(shaped, weight, batch), shaped, weight)
        step()
        shaped.grad = weight.grad = None
        peak = bench.peak_bytes(step)
        seconds = bench.timer.once(step, rounds=5)
    except ImportError as error:
        yield Entry(title, skipped=reason(error), note="peer")
        return
    except FAILURES as error:
        yield Entry(title, error=reason(error), note="peer")
        return
    memory = "" if peak is None else f", peak {peak / 1e9:.2f} GB above its inputs, gradients included"
    yield milliseconds(title, seconds, f"peer{memory}")


def logits_peers(bench: Bench) -> Iterator[Entry]:
    """Measure the loss from logits, forward and backward: ours, eager, and compiled eager."""
    n, v = bench.size((4096, 128256), (12, 300))
    ids, old, advantages, mask = make_batch(bench, n, v)
    batch = Batch(ids, old, advantages, mask)
    logits = torch.randn(n, v, device=bench.device, dtype=torch.bfloat16).requires_grad_()

    def eager(x: Tensor) -> Tensor:
        return clipped_surrogate(x.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1), batch)

    def fused(x: Tensor) -> Tensor:
        return logits_ppo_loss(x, *batch, cliprange=CLIPRANGE, backend="triton").loss

    losses = {"logits_ppo_loss": fused, "eager": eager}
    if not bench.dry_run:
        losses["torch.compile of eager"] = torch.compile(eager, dynamic=False)
    for name, loss in losses.items():
        seconds = bench.timer.once(stepper(lambda loss=loss: loss(logits), logits))
        yield milliseconds(f"from logits, {name}, N={n}", seconds, f"V={v} bf16")


def gae_peer(bench: Bench) -> Iterator[Entry]:
    """Measure the Python loop that trainers use for GAE, launches included."""
    b, t = bench.size((128, 4096), (3, 40))
    rewards, values = (torch.randn(b, t, device=bench.device) for _ in range(2))
    seconds = bench.timer.once(lambda: gae_loop(rewards, values, 1.0, 0.95), rounds=3, warmup=1)
    yield milliseconds(f"gae as a Python loop, {b}x{t}", seconds, "launches included")


_OTHERS = {name: make for name, make in PEERS.items() if name != "CCE torch_compile"}
_ORDERED = {"ours": ours, "cut-cross-entropy": cut_cross_entropy, "verl": verl} | {
    name: make for compiles in (False, True) for name, make in _OTHERS.items() if (name in COMPILING) == compiles
}
"""Peers that run a compiler are last, because they take the longest to start."""

PARTS = {name: partial(head_peer, name, make) for name, make in _ORDERED.items()}
PARTS |= {"gae as a Python loop": gae_peer, "from logits": logits_peers}
