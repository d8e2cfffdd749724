"""Time and memory of `linear_ppo_loss` with a frozen weight: a LoRA adapter on the output layer, and int8 and NF4 weights.

Lower bound (`floor`): logits = h W^T and dX = dlogits W in chunks of rows, into preallocated outputs. Memory is peak RSS above
the inputs, the weight as it is stored, and the gradients of hidden states and adapter. No token is clipped or masked.

The other ways to compute the same loss: `concatenated` passes `[h, s h A^T]` and `[W, B]` to the fused head, which copies W in
every step. `eager` computes all logits; with a quantised weight it dequantises the whole weight in every step.

N tokens as B sequences of 128, H hidden, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Check, Row, Session, Worker, alternate_workers, ratio, report
from rlhf_kernels import LowRank, QuantisedWeight, linear_ppo_loss
from rlhf_kernels.ops.weights import NF4

NAME = "head_adapter"
FULL = {"n": 2048, "h": 1024, "v": 32768, "r": 16}
QUICK = {"n": 512, "h": 256, "v": 8192, "r": 16}
TINY = {"n": 128, "h": 64, "v": 512, "r": 4}
CHUNK = 512
DENSE = ("frozen", "LoRA", "LoRA, concatenated", "LoRA, eager")
QUANTISED = ("int8", "int8, eager", "int8 LoRA", "NF4", "NF4, eager", "NF4 LoRA")
SCALE = 2.0


def quantise(weight: Tensor, kind: str) -> QuantisedWeight:
    """Return a float32 weight in int8 or NF4."""
    if kind == "int8":
        scales = weight.abs().amax(1) / 127
        return QuantisedWeight.int8((weight / scales[:, None]).round().to(torch.int8), scales)
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(1)
    table = torch.tensor(NF4)
    bounds = (table[1:] + table[:-1]) / 2  # between neighbouring values
    codes = torch.bucketize(blocks / absmax[:, None], bounds).to(torch.uint8).view(-1, 2)
    return QuantisedWeight.nf4(codes[:, 0] << 4 | codes[:, 1], absmax, *weight.shape)


def make_weight(v: int, h: int, case: str, dtype: torch.dtype) -> Tensor | QuantisedWeight:
    weight = 0.02 * torch.randn(v, h)
    kind = case.split()[0].rstrip(",")
    return quantise(weight, kind) if kind in ("int8", "NF4") else weight.to(dtype)


def make_step(case: str, shape: dict, dtype: torch.dtype) -> Callable[[], None]:
    """Allocate the tensors of `case` and return one forward and backward pass."""
    torch.manual_seed(0)
    n, h, v, r = (shape[k] for k in ("n", "h", "v", "r"))
    weight = make_weight(v, h, case, dtype)
    hidden = torch.randn(n // 128, 128, h).to(dtype).requires_grad_()
    ids = torch.randint(0, v, hidden.shape[:2])
    ones = torch.ones(ids.shape)
    batch = {"ids": ids, "old_logprobs": -ones, "advantages": torch.randn(ids.shape), "mask": ones.bool()}
    options: dict[str, Any] = {"objective": "policy_gradient", "backend": "reference" if "eager" in case else "auto"}
    if case == "floor":
        return floor_step(hidden.detach().flatten(0, 1), weight)
    a = (0.02 * torch.randn(r, h)).to(dtype).requires_grad_()
    b = (0.02 * torch.randn(v, r)).to(dtype).requires_grad_()

    def loss() -> Tensor:
        if "LoRA" not in case:
            return linear_ppo_loss(hidden, weight, **batch, **options).loss
        term = LowRank.lora(hidden, a, b, SCALE)
        if "concatenated" in case:
            wide, whole = torch.cat([hidden, term.states], -1), torch.cat([weight, term.weight], 1)
            return linear_ppo_loss(wide, whole, **batch, **options).loss
        return linear_ppo_loss(hidden, weight, **batch, **options, low_rank=term).loss

    def step() -> None:
        hidden.grad = a.grad = b.grad = None
        loss().backward()

    return step


def floor_step(hidden: Tensor, weight: Tensor) -> Callable[[], None]:
    """Return a step of two `torch.mm` per chunk; the first call allocates the outputs, and logits serve as their gradient."""
    outputs: list[Tensor] = []

    def step() -> None:
        if not outputs:
            outputs.extend((hidden.new_zeros(CHUNK, len(weight)), torch.zeros_like(hidden)))
        logits, d_hidden = outputs
        for start in range(0, len(hidden), CHUNK):
            rows = hidden[start : start + CHUNK]
            torch.mm(rows, weight.T, out=logits[: len(rows)])
            torch.mm(logits[: len(rows)], weight, out=d_hidden[start : start + CHUNK])

    return step


def worker(session: Session, *, case: str, dtype: str, **shape: int) -> None:
    """Run one case in this process: one forward and backward pass per step of the session."""
    element_type = getattr(torch, dtype)
    make_step(case, TINY, element_type)()  # keeps imports and allocations on first use out of the measured memory
    step = make_step(case, shape, element_type)
    gradients = shape["n"] * shape["h"] + (shape["v"] + shape["h"]) * shape["r"] * ("LoRA" in case)
    session.baseline(expected_bytes=gradients * element_type.itemsize)
    session.ready()
    while session.begin():
        step()
        session.end()


def measure(dtype: str, shape: dict, rounds: int) -> None:
    workers = [
        Worker(
            case,
            "benchmarks.bench_head_adapter:worker",
            {"case": case, "dtype": dtype, **shape},
            start_limit=120,
            step_limit=60,
        )
        for case in ("floor", *DENSE, *QUANTISED)
    ]
    rows = {row.name: row for row in alternate_workers(workers, rounds=rounds)}
    title = "linear_ppo_loss with a frozen weight, {} forward+backward, N={n} H={h} V={v} R={r}".format(dtype, **shape)
    weight_mb = shape["v"] * shape["h"] * getattr(torch, dtype).itemsize / 1e6
    report(NAME, title, list(rows.values()), floor=rows["floor"], checks=_checks(rows, weight_mb))


def _checks(rows: dict[str, Row], weight_mb: float) -> list[Check]:
    """Return the checks; `weight_mb` is the size of the weight in the dtype of the hidden states."""
    lora, whole = rows["LoRA"], rows["LoRA, concatenated"]
    copied = None if lora.extra_mb is None or whole.extra_mb is None else whole.extra_mb - lora.extra_mb
    return [
        Check("LoRA / frozen", ratio(lora, rows["frozen"]), 1.15),
        Check("LoRA / concatenated", ratio(lora, whole), 1.0),
        Check("LoRA / eager", ratio(lora, rows["LoRA, eager"]), 1.0),
        Check("extra MB, concatenated - LoRA, of the weight's", copied and copied / weight_mb, 0.9, at_least=True),
        *(Check(f"{kind} / frozen", ratio(rows[kind], rows["frozen"]), 1.5) for kind in ("int8", "NF4")),
        *(Check(f"{kind} / eager", ratio(rows[kind], rows[f"{kind}, eager"]), 1.0) for kind in ("int8", "NF4")),
        *(
            Check(f"extra MB, {kind} - frozen, of the weight's", _more(rows[kind], rows["frozen"], weight_mb), 1.0)
            for kind in ("int8", "NF4")
        ),
    ]


def _more(row: Row, base: Row, weight_mb: float) -> float | None:
    """Return the memory that `row` needs beyond `base`, relative to the size of the weight."""
    return None if row.extra_mb is None or base.extra_mb is None else (row.extra_mb - base.extra_mb) / weight_mb


def main(*, quick: bool = False) -> None:
    """Measure every case in both dtypes; takes about half a minute if `quick`."""
    for dtype in ("bfloat16", "float32"):
        measure(dtype, QUICK if quick else FULL, rounds=2 if quick else 5)


def test_head_adapter(benchmark) -> None:
    benchmark(make_step("LoRA", QUICK, torch.float32))
