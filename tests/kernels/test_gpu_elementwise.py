"""`scale_cast`, `kl_penalty` and `group_advantages` in Triton."""

import math

import pytest
import torch

from rlhf_kernels import group_advantages, kl_penalty, reference
from rlhf_kernels._triton import elementwise
from rlhf_kernels.backend import kernels

from .helpers.bounds import check_error
from .helpers.gpu import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [1, 5, 4096, 9001]  # less than a block, exactly one, and more than two


def rounded(x, dtype):
    """Return `x` rounded to the nearest value of `dtype`; Triton's interpreter truncates to bfloat16 instead."""
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return x.to(dtype)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_cast_rounds_once(dtype, to, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    scale = torch.tensor(0.37)
    expected = rounded(x.float() * scale, to)
    given = x.to(DEVICE)
    got = kernels("triton").scale_cast(given, scale.to(DEVICE), to)
    assert got.dtype == to and torch.equal(got.cpu(), expected)
    assert (got.data_ptr() == given.data_ptr()) == (dtype == to)
    assert torch.equal(given.cpu(), expected if dtype == to else x)


def test_scale_cast_keeps_the_shape_and_values_that_are_not_finite():
    x = torch.tensor([[math.nan, math.inf], [-math.inf, 1e30]], device=DEVICE)
    got = kernels("triton").scale_cast(x, torch.tensor(2.0, device=DEVICE), torch.float16)
    assert got.shape == (2, 2) and got[0, 0].isnan()
    assert got.flatten()[1:].tolist() == [math.inf, -math.inf, math.inf]
    empty = kernels("triton").scale_cast(x[:0], torch.ones((), device=DEVICE), torch.bfloat16)
    assert empty.shape == (0, 2) and empty.dtype == torch.bfloat16


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize(("n", "scale"), [(1, 0.1), (9001, 1e-6), (9001, 0.1), (4096, 3.0)])
def test_kl_penalty_against_float64(estimator, n, scale):
    g = torch.Generator().manual_seed(n)
    ref, upstream = -torch.rand(n, generator=g) * scale, torch.randn(n, generator=g)
    logprobs = ref + scale * torch.randn(n, generator=g)
    results = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float32, "reference"), (torch.float64, "reference")):
        device = DEVICE if backend == "triton" else "cpu"
        x = logprobs.to(device, dtype, copy=True).requires_grad_()
        y = kl_penalty(x, ref.to(device, dtype), estimator=estimator, backend=backend)
        y.backward(upstream.to(device, dtype))
        results.append((y.cpu(), x.grad.cpu()))
    for name, *three in zip(("value", "gradient"), *results, strict=True):
        check_error(name, *three)


def test_kl_penalty_is_exact_near_zero_and_propagates_nan_and_inf():
    d = torch.tensor([0.0, -0.0, 1e-8, math.nan, math.inf, -math.inf], device=DEVICE)
    expected = {
        "k1": ([0, 0, 1e-8, math.nan, math.inf, -math.inf], [1, 1, 1, math.nan, 1, 1]),
        "k2": ([0, 0, 5e-17, math.nan, math.inf, math.inf], [0, 0, 1e-8, math.nan, math.inf, -math.inf]),
        "k3": ([0, 0, 5e-17, math.nan, math.inf, math.nan], [0, 0, 1e-8, math.nan, 1, -math.inf]),
        "abs": ([0, 0, 1e-8, math.nan, math.inf, math.inf], [0, 0, 1, math.nan, 1, -1]),
    }
    for estimator, (values, slopes) in expected.items():
        x = d.clone().requires_grad_()
        y = kl_penalty(x, torch.zeros_like(d), estimator=estimator, backend="triton")
        y.sum().backward()
        assert y.tolist() == pytest.approx(values, rel=1e-5, abs=0, nan_ok=True), estimator
        assert x.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=0, nan_ok=True), estimator


def test_kl_penalty_takes_strides_shapes_and_half_precision():
    g = torch.Generator().manual_seed(0)
    x, ref = torch.randn(6, 10, generator=g).to(DEVICE), torch.randn(6, 10, generator=g).to(DEVICE)
    options = {"estimator": "k3", "backend": "triton"}
    expected = kl_penalty(x, ref, **options)
    assert torch.equal(kl_penalty(x.T, ref.T, **options), expected.T)
    assert torch.equal(kl_penalty(x[:, ::2], ref[:, ::2], **options), expected[:, ::2])
    assert kl_penalty(x[0, 0], ref[0, 0], **options).shape == ()
    half = x.half().requires_grad_()
    y = kl_penalty(half, ref.half(), **options)
    y.sum().backward()
    assert y.dtype == torch.float32 and half.grad.dtype == torch.float16
    leaf = x[:0].requires_grad_()
    kl_penalty(leaf, ref[:0], **options).sum().backward()
    assert leaf.grad.shape == (0, 10)


@pytest.mark.parametrize(
    ("kind", "how"),
    [("rloo", {}), ("grpo", {}), ("grpo", {"eps": 0.3, "std": "population"}), ("dr_grpo", {})],
    ids=str,
)
@pytest.mark.parametrize(("n", "groups"), [(1, 1), (2, 1), (37, 40), (90, 5)])
def test_group_advantages_against_float64(kind, how, n, groups, monkeypatch):
    monkeypatch.setattr(elementwise, "GROUP_BLOCK", 32)  # the largest groups extend over three blocks
    g = torch.Generator().manual_seed(n)
    scores, index = 3 * torch.randn(n, generator=g) + 1, torch.randint(0, groups, (n,), generator=g) * 10**12 - 7
    got = group_advantages(scores.to(DEVICE), index.to(DEVICE), kind=kind, **how, backend="triton").cpu()
    exact = reference.group_advantages(scores.double(), index, kind=kind, **how)
    eager = reference.group_advantages(scores, index, kind=kind, **how)
    check_error(kind, got, eager, exact, scale=scores.abs().max().item())


def test_group_advantages_of_an_empty_batch_and_in_half_precision():
    scores, index = torch.randn(6, 2).to(DEVICE), torch.arange(6, device=DEVICE) // 4
    got = group_advantages(scores[:, 1].bfloat16(), index.int(), backend="triton")
    assert got.dtype == torch.float32
    assert torch.equal(got, group_advantages(scores[:, 1].bfloat16().float(), index, backend="triton"))
    assert group_advantages(scores[:0, 0], index[:0], backend="triton").shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_accumulate(backend, dtype):
    """Each backend sums parts of any dtype in float32, and the first part overwrites the total."""
    device = torch.device("cpu") if backend == "cpu" else DEVICE
    first, second = (torch.randn(7, 65, device=device).to(dtype) for _ in range(2))
    total = torch.full((7, 65), torch.nan, device=device)
    kernels(backend).accumulate(total, first, first=True)
    assert torch.equal(total, first.float())
    kernels(backend).accumulate(total, second, first=False)
    assert torch.equal(total, first.float() + second.float())
