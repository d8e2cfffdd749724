"""`masked_mean` and `masked_whiten` in Triton: float64, tiles, masks of no or one entry, and invariance of the bits."""

import pytest
import torch

from rlhf_kernels import masked_mean, masked_whiten
from rlhf_kernels._triton import masked

from .helpers.bounds import check_error
from .helpers.gpu import DEVICE, to_device
from .helpers.masked import NAN, batch

OPS = (masked_mean, masked_whiten)


@pytest.fixture(params=[False, True], ids=["tiles of full size", "small tiles"])
def tiles(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(masked, "BLOCK", 128)
        monkeypatch.setattr(masked, "TOTAL_BLOCK", 4)


def run(op, x, mask, **options):
    return op(*to_device((x, mask)), **options, backend="triton").cpu()


def test_no_entry_and_one_entry():
    x = torch.tensor([7.0, NAN, NAN])
    for count, mean in ((0, 0.0), (1, 7.0)):
        mask = torch.arange(3) < count
        assert run(masked_mean, x, mask).item() == mean
        assert run(masked_whiten, x, mask).tolist() == [0.0] * 3
        assert run(masked_whiten, x, mask, shift_mean=False).tolist() == [mean, 0.0, 0.0]
    none = torch.zeros(0, 4)
    assert run(masked_mean, none, none.bool()).item() == 0.0
    assert run(masked_whiten, none, none.bool()).shape == (0, 4)
    one = torch.tensor(3.0)
    assert run(masked_mean, one, one > 0).item() == 3.0
    assert run(masked_whiten, one, one > 0).item() == 0.0


@pytest.mark.parametrize("shape", [(1,), (17,), (128,), (3, 40), (2, 3, 700), (17_001,)])
@pytest.mark.parametrize("mean", [0.0, 1.0, 300.0])
def test_values_and_gradients_against_float64(tiles, shape, mean):
    x, mask = batch(*shape, mean=mean)
    upstream = torch.randn(*shape, generator=torch.Generator().manual_seed(5))
    cases = [lambda x, m, u, backend: masked_mean(x, m, backend=backend) * 0.37]
    for shift_mean in (True, False):
        for unbiased in (True, False):
            options = {"shift_mean": shift_mean, "unbiased": unbiased}
            cases.append(lambda x, m, u, backend, o=options: masked_whiten(x, m, **o, backend=backend) * u)
    for case in cases:
        results = []
        for dtype, backend in ((torch.float32, "triton"), (torch.float32, "reference"), (torch.float64, "reference")):
            device = DEVICE if backend == "triton" else "cpu"
            leaf = x.clone().to(device, dtype).requires_grad_()
            y = case(leaf, mask.to(device), upstream.to(device, dtype), backend)
            y.sum().backward()
            results.append((y.cpu(), leaf.grad.cpu()))
        for name, *three in zip(("value", "gradient"), *results, strict=True):
            check_error(name, *three)


def test_a_small_spread_around_a_large_mean(tiles):
    """Sums of squares in float32 would lose the spread completely."""
    x, mask = batch(3000)
    x = 4096 + x.round(decimals=1)
    white = run(masked_whiten, x, mask)[mask].double()
    assert white.std().item() == pytest.approx(1, abs=1e-4)
    assert white.mean().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_half_precision_strides_and_repetition(tiles, op, dtype):
    x, mask = batch(30, 41)
    x = x.to(dtype)
    expected = run(op, x.float(), mask)
    assert expected.dtype == torch.float32
    for other in (run(op, x, mask), run(op, x.float(), mask), run(op, x.T.contiguous().T, mask.T.contiguous().T)):
        assert torch.equal(other, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_more_than_two_to_the_31_entries_and_graph_capture(op):
    if torch.cuda.mem_get_info()[1] < 60e9:
        pytest.skip("needs 60 GB")
    x = torch.ones(2**31 + 5000, device=DEVICE)
    x[-2500:] = 3
    mask = torch.zeros(x.shape, dtype=torch.bool, device=DEVICE)
    mask[-5000:] = True
    graph = torch.cuda.CUDAGraph()
    expected = op(x[-5000:], mask[-5000:], backend="triton")
    op(x, mask, backend="triton")
    with torch.cuda.graph(graph):
        got = op(x, mask, backend="triton")
    graph.replay()
    got = got if op is masked_mean else got[-5000:]
    torch.testing.assert_close(got, expected)
