"""Checks that need a device: the same bits in repeated calls and in captured graphs, and errors at a real vocabulary size.

Legend: N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from triton.errors import TritonError

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import cases, same_bits
from benchmarks.gpu.entries import Entry
from benchmarks.gpu.timing import capture
from rlhf_kernels import linear_token_logprobs, logits_ppo_loss, reference, token_logprobs
from tests.kernels.helpers.bounds import check_error

FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TritonError, TypeError,
    ValueError,
)  # fmt: skip
"""Errors of one op that do not end the part, so that the other ops still run."""


def determinism(bench: Bench) -> Iterator[Entry]:
    """Compare the bits of three calls per op (two in a dry run); the first may select a kernel, compile or allocate."""
    for name, call in cases(bench.device, bench.backends).items():
        try:
            first, *others = (call() for _ in range(bench.size(3, 2)))
        except FAILURES as error:
            yield Entry(f"same bits: {name}", error=reason(error))
            continue
        yield Entry(f"same bits: {name}", passed=all(same_bits(first, other) for other in others))


def graph_capture(bench: Bench) -> Iterator[Entry]:
    """Capture each op with torch.cuda.graph and compare the bits of a replay with those of the eager call."""
    if bench.dry_run:
        yield Entry("CUDA graphs", skipped="a dry run has no device")
        return
    for name, call in cases(bench.device, bench.backends).items():
        try:
            expected = tuple(x.clone() for x in call())
            graph, made = capture(call)
            for x in made:
                x.zero_()
            graph.replay()
            torch.cuda.synchronize()
        except FAILURES as error:
            yield Entry(f"captured: {name}", error=reason(error))
            continue
        yield Entry(f"captured: {name}", passed=same_bits(expected, made))


def large_rows(bench: Bench) -> Iterator[Entry]:
    """Check outputs and gradients at a real vocabulary size against the error bound of the tests."""
    n, v = bench.size((64, 128256), (5, 2050))
    g = torch.Generator(bench.device).manual_seed(4)
    ids = torch.randint(v, (n,), generator=g, device=bench.device)
    old = -torch.rand(n, generator=g, device=bench.device) * 20
    advantages, mask = torch.randn(n, generator=g, device=bench.device), torch.ones_like(ids, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(n, v, generator=g, device=bench.device)).to(dtype)

        def logprobs(x: Tensor, backend: str) -> tuple[Tensor, ...]:
            made = token_logprobs(x, ids, entropy=True, backend=backend)
            return made.logprobs, made.entropy

        def loss(x: Tensor, backend: str) -> tuple[Tensor, ...]:
            made = logits_ppo_loss(x, ids, old, advantages, mask, entropy_coef=0.01, backend=backend)
            return (made.loss,)

        for op, call in (("token_logprobs", logprobs), ("logits_ppo_loss", loss)):
            for backend in bench.backends(op):
                name = f"error bound at V={v}: {op}, {backend}, {str(dtype).removeprefix('torch.')}"
                yield _within_bound(name, call, logits, backend)


def _within_bound(name: str, call, logits: Tensor, backend: str) -> Entry:
    runs = []
    for x, chosen in ((logits, backend), (logits, "reference"), (logits.double(), "reference")):
        x = x.detach().clone().requires_grad_()
        made = call(x, chosen)
        runs.append((*made, *torch.autograd.grad(sum(y.sum() for y in made), x)))
    try:
        for index, (got, eager, exact) in enumerate(zip(*runs, strict=True)):
            check_error(f"{name}, tensor {index}", got, eager, exact)
    except AssertionError as error:
        return Entry(name, passed=False, note=str(error))
    return Entry(name, passed=True)


def float32_accuracy(bench: Bench) -> Iterator[Entry]:
    """Compare errors against float64: ours and eager float32's from float32 logits, then ours and eager's from bf16 states."""
    n, v = bench.size((256, 128256), (5, 2050))
    g = torch.Generator(bench.device).manual_seed(5)
    logits = 3 * torch.randn(n, v, generator=g, device=bench.device)
    ids = torch.randint(v, (n,), generator=g, device=bench.device)
    exact = reference.token_logprobs(logits.double(), ids).logprobs
    ours = _error(token_logprobs(logits, ids, backend="triton").logprobs, exact)
    eager = _error(logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1), exact)
    note = f"largest error {ours:.3e}, eager's {eager:.3e}" if not bench.dry_run else ""
    value = None if bench.dry_run else ours / eager
    name, bound = "float32 log-prob error / eager float32's", bench.size(2, None)
    yield Entry(name, value, bound=bound, note=note, passed=ours <= 2 * eager)

    n, h, v = bench.size((256, 1024, 32000), (5, 16, 300))
    hidden = torch.randn(n, h, generator=g, device=bench.device).bfloat16()
    weight = (torch.randn(v, h, generator=g, device=bench.device) / h**0.5).bfloat16()
    ids = ids[:n] % v
    exact = reference.token_logprobs(hidden.double() @ weight.double().t(), ids).logprobs
    fused = _error(linear_token_logprobs(hidden, weight, ids, backend="triton").logprobs, exact)
    rounded = _error(reference.token_logprobs(hidden @ weight.t(), ids).logprobs, exact)
    note = f"eager with bf16 logits: {rounded:.3e}" if not bench.dry_run else ""
    yield Entry("log-prob error of linear_token_logprobs, bf16", None if bench.dry_run else fused, note=note)


def batch_invariance(bench: Bench) -> Iterator[Entry]:
    """Check that a row's log-prob has the same bits in batches of different sizes and at different positions."""
    n, h, v = bench.size((1000, 1024, 128256), (30, 16, 300))
    g = torch.Generator(bench.device).manual_seed(6)
    hidden = torch.randn(n, h, generator=g, device=bench.device).bfloat16()
    weight = (torch.randn(v, h, generator=g, device=bench.device) / h**0.5).bfloat16()
    ids = torch.randint(v, (n,), generator=g, device=bench.device)
    whole = linear_token_logprobs(hidden, weight, ids, backend="triton").logprobs
    for rows in (slice(0, 1), slice(3, 10), slice(7, bench.size(136, 24)), slice(n // 2, n)):
        part = linear_token_logprobs(hidden[rows], weight, ids[rows], backend="triton").logprobs
        size = rows.stop - rows.start
        yield Entry(f"same bits in a batch of {size}: linear_token_logprobs", passed=torch.equal(part, whole[rows]))


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max())


def reason(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


PARTS = {
    "determinism": determinism,
    "graph capture": graph_capture,
    "large rows": large_rows,
    "float32 accuracy": float32_accuracy,
    "batch invariance": batch_invariance,
}
