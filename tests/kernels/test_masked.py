"""`masked_mean` and `masked_whiten`: by hand, against float64, gradients, and masks with zero or one True entry."""

import math

import pytest
import torch

from rlhf_kernels import masked_mean, masked_whiten, reference

from .helpers.bounds import check_error
from .helpers.masked import NAN, batch

BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(isa, backend):
    x = torch.tensor([[1.0, NAN, 3.0], [8.0, NAN, NAN]])
    mask = ~x.isnan()
    assert masked_mean(x, mask, backend=backend).item() == 4.0  # deviations -3, -1, 4: squares 26
    for unbiased, variance in ((True, 13.0), (False, 26 / 3)):
        white = [-3 / math.sqrt(variance), 0.0, -1 / math.sqrt(variance), 4 / math.sqrt(variance), 0.0, 0.0]
        got = masked_whiten(x, mask, unbiased=unbiased, backend=backend)
        assert got.flatten().tolist() == pytest.approx(white, rel=1e-6)
        kept = masked_whiten(x, mask, unbiased=unbiased, shift_mean=False, backend=backend)
        shifted = [w + 4 if m else 0.0 for w, m in zip(white, mask.flatten().tolist(), strict=True)]
        assert kept.flatten().tolist() == pytest.approx(shifted, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_entry_and_one_entry(isa, backend):
    x = torch.tensor([7.0, NAN, NAN])
    for count, mean in ((0, 0.0), (1, 7.0)):
        mask = torch.arange(3) < count
        assert masked_mean(x, mask, backend=backend).item() == mean
        assert masked_whiten(x, mask, backend=backend).tolist() == [0.0] * 3
        assert masked_whiten(x, mask, shift_mean=False, backend=backend).tolist() == [mean, 0.0, 0.0]
    none = torch.zeros(0, 4)
    assert masked_mean(none, none.bool(), backend=backend).item() == 0.0
    assert masked_whiten(none, none.bool(), backend=backend).shape == (0, 4)


@pytest.mark.parametrize("shape", [(1,), (17,), (3, 40), (2, 3, 700), (130_001,)])
@pytest.mark.parametrize("mean", [0.0, 1.0, 300.0])
def test_values_and_gradients_against_float64(isa, shape, mean):
    x, mask = batch(*shape, mean=mean)
    upstream = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    cases = [lambda x, m, backend: masked_mean(x, m, backend=backend) * 0.37]
    for shift_mean in (True, False):
        for unbiased in (True, False):
            options = {"shift_mean": shift_mean, "unbiased": unbiased}
            cases.append(lambda x, m, backend, o=options: masked_whiten(x, m, **o, backend=backend))
    for case in cases:
        results = []
        for dtype, backend in ((torch.float32, "cpu"), (torch.float32, "reference"), (torch.float64, "reference")):
            leaf = x.clone().to(dtype).requires_grad_()
            y = case(leaf, mask, backend)
            (y * upstream.to(dtype)).sum().backward()
            results.append((y, leaf.grad))
        for name, *three in zip(("value", "gradient"), *results, strict=True):
            check_error(name, *three)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(isa, dtype):
    x, mask = batch(30, 41)
    x = x.to(dtype)
    for op in (masked_mean, masked_whiten):
        expected = op(x.float(), mask)
        assert expected.dtype == op(x, mask).dtype == torch.float32
        assert torch.equal(op(x, mask), expected)
        assert torch.equal(op(x.T.contiguous().T, mask.T.contiguous().T), expected)
    leaf = torch.nan_to_num(x).requires_grad_()
    masked_mean(leaf, mask).backward()
    assert leaf.grad.dtype == dtype


def test_threads_and_repetition_do_not_matter(isa):
    x, mask = batch(300_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = masked_whiten(x, mask), masked_mean(x, mask)
        torch.set_num_threads(2)
        two = masked_whiten(x, mask), masked_mean(x, mask)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("op", [masked_mean, masked_whiten])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(3).long()}),
        ("x", {"x": [1.0]}),
        ("mask", {"mask": torch.ones(3)}),
        ("mask", {"mask": torch.ones(4, dtype=torch.bool)}),
        ("backend", {"backend": "fast"}),
    ],
)
def test_mistakes_are_named(op, name, change):
    with pytest.raises(ValueError, match=f"^{name}: got .*"):
        op(**({"x": torch.zeros(3), "mask": torch.ones(3, dtype=torch.bool)} | change))


def test_registered_ops_and_compile():
    x, mask = batch(3, 20)
    x = torch.nan_to_num(x).requires_grad_()
    torch.library.opcheck(torch.ops.rlhf_kernels.masked_mean.default, (x, mask, "cpu"))
    torch.library.opcheck(torch.ops.rlhf_kernels.masked_whiten.default, (x, mask, False, True, "cpu"))
    for op in (masked_mean, masked_whiten):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        (a,) = torch.autograd.grad(compiled(x, mask).square().sum(), x)
        (b,) = torch.autograd.grad(op(x, mask).square().sum(), x)
        assert torch.equal(a, b)
    assert torch.equal(masked_mean(x, mask), masked_mean(x.detach(), mask))


def test_gradient_of_the_gradient():
    x, mask = batch(12)
    x = torch.nan_to_num(x).requires_grad_()

    def twice(op):
        (g,) = torch.autograd.grad(op(x).square().sum() * x.sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)[0]

    torch.testing.assert_close(twice(lambda x: masked_mean(x, mask)), twice(lambda x: reference.masked_mean(x, mask)))
