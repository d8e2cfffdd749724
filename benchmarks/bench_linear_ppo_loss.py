"""Time and memory of `linear_ppo_loss`, forward and backward, against three matrix products and every CPU peer.

Lower bound (`floor`): logits = h W^T, dX = dlogits W, dW = dlogits^T h, in chunks of rows, into preallocated outputs, with
the fastest chunk size. Memory is peak RSS above inputs, weight and their gradients. No token of the batch is clipped, so
no case can save time by skipping rows, except the case in which half of the tokens are masked.

N tokens as B sequences of 128, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Check, Row, Session, Worker, alternate_workers, ratio, report
from benchmarks.peers.policy_losses import CLIPRANGE, COMPILING, PEERS, Batch
from rlhf_kernels import linear_ppo_loss
from rlhf_kernels.backend import choose

NAME = "linear_ppo_loss"
CHUNKS = (256, 512, 1024, 2048)
OURS = ("ours", "ours, every flag", "ours, half masked")
FULL = {"n": 2048, "h": 768, "v": 50257}
QUICK = {"n": 1024, "h": 256, "v": 8192}
TINY = {"n": 128, "h": 64, "v": 512}


def make_batch(n: int, h: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Batch]:
    """Return hidden states, weight and a batch whose ratios are all inside the clip range."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n // 128, 128, h).to(dtype), (0.02 * torch.randn(v, h)).to(dtype)
    ids = torch.randint(0, v, (n // 128, 128))
    rows = [  # one sequence at a time: nothing of size [N, V] may exist before the memory is measured
        (x @ weight.T).float().log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        for x, y in zip(hidden, ids, strict=True)
    ]
    old_logprobs = torch.stack(rows) + 0.05 * torch.randn(ids.shape).clamp(-2, 2)
    batch = Batch(ids, old_logprobs, torch.randn(ids.shape), torch.ones(ids.shape, dtype=torch.bool))
    return hidden.requires_grad_(), weight.requires_grad_(), batch


def ours(case: str, hidden: Tensor, weight: Tensor, batch: Batch) -> Callable[[], Tensor]:
    """Return the call of `case`; its extra tensors are allocated here, before the measurement."""
    options = {}
    if case == "ours, half masked":
        batch = batch._replace(mask=torch.randperm(batch.ids.numel()).view_as(batch.ids) % 2 == 0)
    if case == "ours, every flag":
        values = torch.randn(batch.ids.shape)
        options = {
            "value_weight": (0.02 * torch.randn(hidden.shape[-1])).to(hidden.dtype).requires_grad_(),
            "value_bias": torch.zeros((), dtype=hidden.dtype).requires_grad_(),
            "old_values": values,
            "returns": values + 0.1 * torch.randn_like(values),
            "temperature": 0.8 + 0.4 * torch.rand(batch.ids.shape),
            "softcap": 30.0,
            "entropy_coef": 0.01,
            "ref_logprobs": batch.old_logprobs - 0.1,
            "kl_coef": 0.05,
        }
    return lambda: linear_ppo_loss(hidden, weight, *batch, cliprange=CLIPRANGE, **options).loss


def floor_step(hidden: Tensor, weight: Tensor, chunk: int) -> Callable[[], None]:
    """Return a step of three `torch.mm` per chunk; the first call allocates the outputs, and logits serve as their gradient."""
    hidden, weight = hidden.detach().flatten(0, 1), weight.detach()
    outputs = []

    def step() -> None:
        if not outputs:
            outputs.extend((hidden.new_zeros(chunk, len(weight)), torch.zeros_like(hidden), torch.zeros_like(weight)))
        logits, d_hidden, d_weight = outputs
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk]
            torch.mm(rows, weight.T, out=logits)
            torch.mm(logits, weight, out=d_hidden[start : start + chunk])
            torch.mm(logits.T, rows, out=d_weight)

    return step


def make_step(case: str, shape: dict, dtype: torch.dtype) -> Callable[[], None]:
    """Allocate the tensors of `case` and return one forward and backward pass."""
    hidden, weight, batch = make_batch(**shape, dtype=dtype)
    if case.startswith("floor"):
        return floor_step(hidden, weight, min(int(case.split()[-1]), shape["n"]))
    peer = PEERS[case]() if case in PEERS else None
    loss = (lambda: peer(hidden, weight, batch)) if peer else ours(case, hidden, weight, batch)

    def step() -> None:
        hidden.grad = weight.grad = None
        loss().backward()

    return step


def worker(session: Session, *, case: str, dtype: str, **shape: int) -> None:
    """Run one case in this process: one forward and backward pass per step of the session."""
    element_type = getattr(torch, dtype)
    make_step(case, TINY, element_type)()  # keeps imports and compilation on first use out of the measured memory
    step = make_step(case, shape, element_type)
    if case in COMPILING:
        step()
    gradient_bytes = (shape["n"] + shape["v"]) * shape["h"] * element_type.itemsize
    session.baseline(expected_bytes=0 if case in COMPILING else gradient_bytes)  # a compiled peer has them by now
    session.ready()
    while session.begin():
        step()
        session.end()


def measure(dtype: str, shape: dict, rounds: int) -> None:
    cases = [f"floor, chunks of {chunk}" for chunk in CHUNKS if chunk <= shape["n"]] + [*OURS, *PEERS]
    backend = choose("linear_ppo_loss", torch.device("cpu"), getattr(torch, dtype)).backend
    notes = dict.fromkeys(OURS, f"backend {backend}") | dict.fromkeys(COMPILING, "memory after its compile")
    workers = [
        Worker(
            case,
            "benchmarks.bench_linear_ppo_loss:worker",
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
    title = "{} forward+backward, {}, N={n} H={h} V={v}".format(NAME, dtype, **shape)
    report(NAME, title, list(rows.values()), floor=floor, checks=_checks(rows, floor, dtype))


def _checks(rows: dict[str, Row], floor: Row, dtype: str) -> list[Check]:
    plain, flags, half = (rows[name] for name in OURS)
    checks = [
        Check("ours / floor", ratio(plain, floor), 1.15),
        Check("half masked / none masked", ratio(half, plain), 0.60),
    ]
    if dtype == "bfloat16":
        checks += [Check(f"extra MB, {row.name}", row.extra_mb, 250) for row in (plain, flags)]
    return checks + [Check(f"ours / {name}", ratio(plain, rows[name]), 1.0) for name in PEERS if not rows[name].error]


def main(*, quick: bool = False) -> None:
    """Measure every case in both dtypes; takes about a minute if `quick`."""
    for dtype in ("bfloat16", "float32"):
        measure(dtype, QUICK if quick else FULL, rounds=2 if quick else 5)


def test_linear_ppo_loss(benchmark) -> None:
    hidden, weight, batch = make_batch(**QUICK, dtype=torch.float32)
    benchmark(lambda: ours("ours", hidden, weight, batch)().backward())
