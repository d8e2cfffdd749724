"""Time of `gae` and `rollout_advantages` against memory copies of their inputs and outputs, and of a Python loop.

Lower bounds (`floor`): `gae` reads rewards and values and writes advantages and returns, so its bound is a copy of four
float32 tensors of that shape into existing ones. `rollout_advantages` moves 29 bytes per element (three float32 and a mask
in, four float32 out), or 37 with whitening, so its bound is a copy of one block of that size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import Check, alternate, ratio, report
from benchmarks.peers.gae_loop import gae_loop
from rlhf_kernels import gae, rollout_advantages
from rlhf_kernels.backend import choose

NAME = "gae"
SHAPES = ((64, 512), (512, 1024), (128, 4096))
LONG = (8, 131072)


def make_rollout(b: int, t: int) -> dict[str, torch.Tensor]:
    """Return log-probs, values, scores and a mask of responses with different lengths."""
    torch.manual_seed(0)
    lengths = torch.randint(t // 2, t + 1, (b, 1))
    logprobs = -torch.rand(b, t)
    return {
        "scores": torch.randn(b),
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.1 * torch.randn(b, t),
        "values": torch.randn(b, t),
        "mask": torch.arange(t) < lengths,
    }


def copies(b: int, t: int) -> Callable[[], None]:
    """Return a call that copies four float32 tensors into four existing ones."""
    pairs = [(torch.zeros(b, t), torch.randn(b, t)) for _ in range(4)]
    return lambda: [destination.copy_(source) for destination, source in pairs]


def block_copy(b: int, t: int, bytes_an_element: int) -> Callable[[], torch.Tensor]:
    source = torch.ones(b * t * bytes_an_element, dtype=torch.uint8)
    destination = torch.zeros_like(source)
    return lambda: destination.copy_(source)


def measure_gae(b: int, t: int, rounds: int) -> None:
    data = make_rollout(b, t)
    rewards, values, mask = data["logprobs"], data["values"], data["mask"]
    floor, ours, loop = alternate(
        {
            "copy of four tensors": copies(b, t),
            "ours": lambda: gae(rewards, values, mask, gamma=1.0, lam=0.95),
            "Python loop": lambda: gae_loop(rewards, values, 1.0, 0.95),
        },
        rounds=rounds,
    )
    checks = [Check(f"gae {b}x{t} / copy", ratio(ours, floor), 3.0)]
    if (b, t) == LONG:
        checks = [Check(f"Python loop / gae {b}x{t}", ratio(loop, ours), 300, at_least=True)]
    report(NAME, f"gae {b}x{t}, backend {_backend()}", [floor, ours, loop], floor=floor, checks=checks)


def measure_rollout(b: int, t: int, rounds: int) -> None:
    data = make_rollout(b, t)
    rows = alternate(
        {
            "copy of 29 bytes an element": block_copy(b, t, 29),
            "ours": lambda: rollout_advantages(**data, kl_coef=0.05, whiten_advantages=False),
            "copy of 37 bytes an element": block_copy(b, t, 37),
            "ours, whitened": lambda: rollout_advantages(**data, kl_coef=0.05),
        },
        rounds=rounds,
    )
    for (floor, ours), what in zip((rows[:2], rows[2:]), ("", " whitened"), strict=True):
        title = f"rollout_advantages {b}x{t}{what}"
        checks = [Check(f"{title} / copy", ratio(ours, floor), 3.0)]
        report(NAME, f"{title}, backend {_backend()}", [floor, ours], floor=floor, checks=checks)


def _backend() -> str:
    return choose("gae", torch.device("cpu"), torch.float32).backend


def main(*, quick: bool = False) -> None:
    """Measure every shape of `SHAPES` and `LONG`; only the first shape if `quick`."""
    # glibc returns freed blocks to the system until one large block has been freed, as it has in any process that trains.
    # Without this block, the first shapes would measure page faults of the outputs.
    block = torch.empty(30 * 2**20, dtype=torch.uint8)
    del block
    rounds = 3 if quick else 11
    for b, t in SHAPES[:1] if quick else SHAPES:
        measure_gae(b, t, rounds)
        measure_rollout(b, t, rounds)
    if not quick:
        measure_gae(*LONG, rounds=3)


def test_gae(benchmark) -> None:
    data = make_rollout(64, 512)
    benchmark(gae, data["logprobs"], data["values"], data["mask"], gamma=1.0, lam=0.95)


def test_rollout_advantages(benchmark) -> None:
    benchmark(rollout_advantages, **make_rollout(64, 512), kl_coef=0.05)
