"""`kl_penalty`: values and gradients of the estimators, by hand and against float64, for small and large differences."""

import math

import pytest
import torch

from rlhf_kernels import kl_penalty

from .helpers.bounds import check_error

ESTIMATORS = ("k1", "k2", "k3", "abs")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("estimator", "values", "slopes"),
    [
        ("k1", [0.5, -0.5, 0.0], [1.0, 1.0, 1.0]),
        ("k2", [0.125, 0.125, 0.0], [0.5, -0.5, 0.0]),
        (
            "k3",
            [math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5, 0.0],
            [1 - math.exp(-0.5), 1 - math.exp(0.5), 0.0],
        ),
        ("abs", [0.5, 0.5, 0.0], [1.0, -1.0, 0.0]),
    ],
)
def test_by_hand(isa, backend, estimator, values, slopes):
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    ref = torch.tensor([-1.5, -1.5, -3.0], requires_grad=True)
    got = kl_penalty(logprobs, ref, estimator=estimator, backend=backend)
    got.backward(torch.tensor([1.0, 2.0, 0.37]))
    assert got.tolist() == pytest.approx(values, rel=1e-6)
    expected = [a * b for a, b in zip(slopes, (1, 2, 0.37), strict=True)]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-6)
    assert ref.grad is None


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("n", [1, 4, 15, 16, 1003, 100_003])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 3.0])
def test_against_float64(isa, estimator, n, scale):
    g = torch.Generator().manual_seed(n)
    d = scale * torch.randn(n, generator=g)
    ref, upstream = -torch.rand(n, generator=g) * scale, torch.randn(n, generator=g)
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float32, "reference"), (torch.float64, "reference")):
        x = (ref + d).to(dtype).requires_grad_()
        y = kl_penalty(x, ref.to(dtype), estimator=estimator, backend=backend)
        y.backward(upstream.to(dtype))
        results.append((y, x.grad))
    for name, *three in zip(("value", "gradient"), *results, strict=True):
        check_error(name, *three)


def test_k3_is_relatively_exact_and_never_negative(isa):
    """In float32, exp(-d) - 1 + d as written is rounding noise of either sign for small d."""
    d = torch.logspace(-10, 1, 3000)
    d = torch.cat([d, -d])
    got = kl_penalty(d, torch.zeros_like(d), estimator="k3", backend="cpu")
    exact = torch.expm1(-d.double()) + d.double()
    exact = torch.where(d.abs() < 1e-4, d.double() ** 2 / 2 - d.double() ** 3 / 6, exact)
    assert (got >= 0).all()
    assert ((got.double() - exact).abs() / exact).max().item() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_gradient_dtype(isa, dtype):
    x = torch.randn(5, 7).to(dtype).requires_grad_()
    ref = torch.randn(5, 7).to(dtype)
    y = kl_penalty(x, ref, estimator="k2")
    y.sum().backward()
    assert y.dtype == torch.float32
    assert x.grad.dtype == dtype
    assert torch.equal(y, 0.5 * (x.float() - ref.float()) ** 2)


def test_strides_shapes_and_mixed_dtypes(isa):
    x, ref = torch.randn(6, 10), torch.randn(6, 10)
    expected = kl_penalty(x, ref, estimator="k3")
    assert torch.equal(kl_penalty(x.T.contiguous().T, ref, estimator="k3"), expected)
    assert torch.equal(kl_penalty(x.T, ref.T, estimator="k3"), expected.T)
    assert torch.equal(kl_penalty(x, ref.double(), estimator="k3"), expected)
    assert kl_penalty(x[0, 0], ref[0, 0]).shape == ()
    assert kl_penalty(x[:0], ref[:0]).shape == (0, 10)


def test_two_losses_in_one_backward(isa):
    x, ref = torch.randn(50, requires_grad=True), torch.randn(50)
    (kl_penalty(x, ref, estimator="k3").sum() + 2 * kl_penalty(x, ref, estimator="k2").sum()).backward()
    y = x.detach().double().requires_grad_()
    d = y - ref.double()
    ((torch.exp(-d) - 1 + d).sum() + (d * d).sum()).backward()
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not kl_penalty(x, ref).requires_grad


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logprobs", {"logprobs": torch.zeros(3).long()}),
        ("logprobs", {"logprobs": [0.0]}),
        ("ref_logprobs", {"ref_logprobs": torch.zeros(4)}),
        ("ref_logprobs", {"ref_logprobs": None}),
        ("estimator", {"estimator": "k5"}),
        ("backend", {"backend": "fast"}),
    ],
)
def test_mistakes_are_named(name, change):
    with pytest.raises(ValueError, match=f"^{name}: got .*"):
        kl_penalty(**({"logprobs": torch.zeros(3), "ref_logprobs": torch.zeros(3)} | change))


def test_registered_op_and_compile():
    x, ref = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20)
    torch.library.opcheck(torch.ops.rlhf_kernels.kl_penalty.default, (x, ref, 2, "cpu"))
    torch.library.opcheck(torch.ops.rlhf_kernels.kl_penalty_backward.default, (ref, x.detach(), ref, 2, "cpu"))
    compiled = torch.compile(lambda a, b: kl_penalty(a, b, estimator="k3"), fullgraph=True, backend="aot_eager")
    y = compiled(x, ref)
    y.sum().backward()
    expected = x.grad.clone()
    x.grad = None
    kl_penalty(x, ref, estimator="k3").sum().backward()
    assert torch.equal(y, kl_penalty(x, ref, estimator="k3"))
    assert torch.equal(x.grad, expected)


def test_a_second_derivative_is_refused():
    x = torch.randn(5, requires_grad=True)
    (slope,) = torch.autograd.grad(kl_penalty(x, torch.randn(5), estimator="k3").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rlhf_kernels differentiates once"):
        slope.sum().backward()
