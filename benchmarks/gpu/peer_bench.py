"""`linear_ppo_loss` beside what other packages offer, at 4096 tokens, whichever of them import here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from benchmarks.gpu.bench import Bench, milliseconds
from benchmarks.gpu.correctness import FAILURES, reason
from benchmarks.gpu.entries import Entry
from benchmarks.gpu.head_bench import make_batch, make_head, stepper
from benchmarks.peers.policy_losses import CLIPRANGE, COMPILING, PEERS, Batch, Loss, clipped_surrogate
from rlhf_kernels import linear_ppo_loss


def cut_cross_entropy() -> Loss:
    """Apple's cut-cross-entropy with its own kernel, which a GPU has."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        return clipped_surrogate(-linear_cross_entropy(hidden, weight, batch.ids, reduction="none", impl="cce"), batch)

    return loss


def ours() -> Loss:
    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
        return linear_ppo_loss(hidden, weight, *batch, cliprange=CLIPRANGE, backend="triton").loss

    return loss


def peer(name: str, make: Callable[[], Loss], bench: Bench) -> Iterator[Entry]:
    """Its time and its peak memory above inputs; a package that is not here is named as missing."""
    n, h, v = bench.size((4096, 4096, 128256), (256, 16, 160))
    title = f"{name}, N={n}"
    if bench.dry_run and name in (*COMPILING, "cut-cross-entropy"):
        yield Entry(title, skipped="a dry run starts no compiler and no kernel of others", note="peer")
        return
    hidden, weight = make_head(bench, n, h, v)
    batch = Batch(*(x.view(-1, 128) for x in make_batch(bench, n, v)))
    # The same leaf for every peer, seen as sequences.
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


def _part(name: str, make: Callable[[], Loss]):
    return lambda bench: peer(name, make, bench)


_OTHERS = {name: make for name, make in PEERS.items() if name != "CCE torch_compile"}
_ORDERED = {"ours": ours, "cut-cross-entropy": cut_cross_entropy} | {
    name: make for compiles in (False, True) for name, make in _OTHERS.items() if (name in COMPILING) == compiles
}
"""Those that run a compiler come last: they take the longest to start."""

PARTS = {name: _part(name, make) for name, make in _ORDERED.items()}
