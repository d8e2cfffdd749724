"""Time of `token_logprobs` on logits, forward and forward+backward, against common implementations.

Baseline (`floor`): one copy of the logits into an existing tensor, which reads and writes each element once. A forward pass
needs only the read; forward and backward need two reads and one write.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Check, Row, alternate, ratio, report
from rlhf_kernels import token_logprobs
from rlhf_kernels.backend import choose

NAME = "token_logprobs"
FULL = (16, 128, 50257)
QUICK = (4, 64, 8192)

Logprobs = Callable[[Tensor, Tensor], Tensor]  # logits (B, T, V), ids (B, T) -> (B, T)


def log_softmax_gather(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)


def ours(logits: Tensor, ids: Tensor) -> Tensor:
    return token_logprobs(logits, ids).logprobs


def peers() -> tuple[dict[str, Logprobs], list[Row]]:
    """Return the peers that can be imported, and a row with the reason for each that cannot."""
    found: dict[str, Logprobs] = {"log_softmax + gather": log_softmax_gather, "F.cross_entropy": cross_entropy}
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError as error:
        return found, [Row("TRL selective_log_softmax", error=f"ImportError: {error}")]
    return found | {"TRL selective_log_softmax": selective_log_softmax}, []


def forward_backward(logprobs: Logprobs, logits: Tensor, ids: Tensor) -> Callable[[], None]:
    """Return a step that computes the gradient of the mean log-prob into a new `logits.grad`."""

    def step() -> None:
        logits.grad = None
        logprobs(logits, ids).mean().backward()

    return step


def measure(dtype: torch.dtype, shape: tuple[int, int, int], rounds: int) -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(shape).to(dtype), torch.randint(0, shape[-1], shape[:2])
    copy = torch.zeros_like(logits)
    floor_case = {"copy of the logits": lambda: copy.copy_(logits)}
    found, missing = peers()
    functions = {"ours": ours} | found
    forward = {name: (lambda f=function: f(logits, ids)) for name, function in functions.items()}
    _group("forward", floor_case | forward, missing, shape, dtype, rounds)
    leaf = logits.clone().requires_grad_()
    backward = {name: forward_backward(function, leaf, ids) for name, function in functions.items()}
    _group("forward+backward", floor_case | backward, missing, shape, dtype, rounds)


def _group(what: str, cases: dict, missing: list[Row], shape: tuple, dtype: torch.dtype, rounds: int) -> None:
    with torch.set_grad_enabled("backward" in what):
        floor, plain, *others = alternate(cases, rounds=rounds)
    plain.note = f"backend {choose('token_logprobs', torch.device('cpu'), dtype).backend}"
    checks = [Check(f"ours / {row.name}", ratio(plain, row), 1.0) for row in others]
    title = f"{NAME} {what}, {str(dtype).removeprefix('torch.')}, {'x'.join(map(str, shape))}"
    report(NAME, title, [floor, plain, *others, *missing], floor=floor, checks=checks)


def main(*, quick: bool = False) -> None:
    """Measure forward and forward+backward in both dtypes."""
    for dtype in (torch.bfloat16, torch.float32):
        measure(dtype, QUICK if quick else FULL, rounds=3 if quick else 5)


def test_token_logprobs(benchmark) -> None:
    logits, ids = torch.randn(QUICK), torch.randint(0, QUICK[-1], QUICK[:2])
    benchmark(token_logprobs, logits, ids)
