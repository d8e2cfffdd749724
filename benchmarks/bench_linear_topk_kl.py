"""Time and memory of `linear_topk_kl`, forward and backward, against three matrix products and eager PyTorch.

Lower bound (`floor`): logits = h W^T, dX = dlogits W, dW = dlogits^T h, in chunks of rows, into preallocated outputs, with
the fastest chunk size. Memory is peak RSS above inputs, weight and their gradients. Every token has a gradient.

N tokens as B sequences of 128, H hidden, V vocabulary, K tokens that the teacher lists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_linear_ppo_loss import CHUNKS, floor_step
from benchmarks.harness import Check, Row, Session, Worker, alternate_workers, ratio, report
from rlhf_kernels import linear_topk_kl
from rlhf_kernels.backend import choose

NAME = "linear_topk_kl"
OURS = {
    "ours": {},
    "ours, reverse, tail": {"direction": "reverse", "tail": "lump"},
    "ours, jsd, tail": {"direction": "jsd", "tail": "lump"},
    "ours, 4 of 5 rejected": {},
}
EAGER = "eager, log_softmax and gather"
FULL = {"n": 2048, "h": 768, "v": 50257, "k": 64}
QUICK = {"n": 1024, "h": 256, "v": 8192, "k": 64}
TINY = {"n": 128, "h": 64, "v": 512, "k": 8}


def make_batch(
    n: int, h: int, v: int, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return hidden states, weight, and the teacher's ids and log-probs with the mask."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n // 128, 128, h).to(dtype), (0.02 * torch.randn(v, h)).to(dtype)
    rows = [  # one sequence at a time: nothing of size [N, V] may exist before the memory is measured
        ((x @ weight.T).float() + 0.5 * torch.randn(128, v)).log_softmax(-1).topk(k) for x in hidden
    ]
    teacher = torch.stack([x.indices for x in rows]), torch.stack([x.values for x in rows])
    mask = torch.ones(n // 128, 128, dtype=torch.bool)
    return hidden.requires_grad_(), weight.requires_grad_(), (*teacher, mask)


def ours(case: str, hidden: Tensor, weight: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Tensor]:
    """Return the call of `case`; its extra tensors are allocated here, before the measurement."""
    ids, logprobs, mask = batch
    if case.endswith("rejected"):
        mask = torch.arange(mask.numel()).view_as(mask) % 5 == 0
    return lambda: linear_topk_kl(hidden, weight, ids, logprobs, mask, **OURS[case]).loss


def eager(hidden: Tensor, weight: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the forward divergence from the logits of all tokens."""
    ids, logprobs, mask = batch
    student = (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids)
    return ((logprobs.exp() * (logprobs - student)).sum(-1) * mask).sum() / mask.sum()


def make_step(case: str, shape: dict, dtype: torch.dtype) -> Callable[[], None]:
    """Allocate the tensors of `case` and return one forward and backward pass."""
    hidden, weight, batch = make_batch(**shape, dtype=dtype)
    if case.startswith("floor"):
        return floor_step(hidden, weight, min(int(case.split()[-1]), shape["n"]))
    loss = (lambda: eager(hidden, weight, batch)) if case == EAGER else ours(case, hidden, weight, batch)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss().backward()

    return step


def worker(session: Session, *, case: str, dtype: str, **shape: int) -> None:
    """Run one case in this process: one forward and backward pass per step of the session."""
    element_type = getattr(torch, dtype)
    make_step(case, TINY, element_type)()  # keeps imports and allocations on first use out of the measured memory
    step = make_step(case, shape, element_type)
    session.baseline(expected_bytes=(shape["n"] + shape["v"]) * shape["h"] * element_type.itemsize)
    session.ready()
    while session.begin():
        step()
        session.end()


def measure(dtype: str, shape: dict, rounds: int) -> None:
    """Measure all cases in turn and report them with their bounds."""
    cases = [f"floor, chunks of {chunk}" for chunk in CHUNKS if chunk <= shape["n"]] + [*OURS, EAGER]
    backend = choose(NAME, torch.device("cpu"), getattr(torch, dtype)).backend
    notes = dict.fromkeys(OURS, f"backend {backend}")
    workers = [
        Worker(
            case,
            "benchmarks.bench_linear_topk_kl:worker",
            {"case": case, "dtype": dtype, **shape},
            start_limit=120,
            step_limit=60,
            note=notes.get(case, ""),
        )
        for case in cases
    ]
    rows = {row.name: row for row in alternate_workers(workers, rounds=rounds)}
    floors = [row for name, row in rows.items() if name.startswith("floor") and not row.error]
    floor = min(floors, key=lambda row: row.median)
    title = "{} forward+backward, {}, N={n} H={h} V={v} K={k}".format(NAME, dtype, **shape)
    report(NAME, title, list(rows.values()), floor=floor, checks=_checks(rows, floor))


def _checks(rows: dict[str, Row], floor: Row) -> list[Check]:
    plain, reverse, jsd, rejected = (rows[name] for name in OURS)
    return [
        *(Check(f"{row.name} / floor", ratio(row, floor), 1.15) for row in (plain, reverse, jsd)),
        Check("4 of 5 rejected / none", ratio(rejected, plain), 0.50),
        Check("ours / eager", ratio(plain, rows[EAGER]), 1.0),
        Check("extra MB, ours", plain.extra_mb, 250),
    ]


def main(*, quick: bool = False) -> None:
    """Measure every case in both dtypes; takes about a minute if `quick`."""
    for dtype in ("bfloat16", "float32"):
        measure(dtype, QUICK if quick else FULL, rounds=2 if quick else 5)


def test_linear_topk_kl(benchmark) -> None:
    hidden, weight, batch = make_batch(**QUICK, dtype=torch.float32)
    benchmark(lambda: ours("ours", hidden, weight, batch)().backward())
