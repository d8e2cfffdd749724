"""`gae` in Triton: exact numbers, float64, tiles and their carry, padded against packed, and invariance of the bits."""

import itertools

import pytest
import torch

from rlhf_kernels import gae, reference
from rlhf_kernels._triton import scan
from rlhf_kernels.backend import kernels

from .helpers.advantages import INF, INVALID_CU_SEQLENS, MASKS, NAN, batch, check_invalid_cu_seqlens
from .helpers.bounds import check_error
from .helpers.gpu import DEVICE, to_device


@pytest.fixture
def small_tiles(monkeypatch):
    """Use tiles of 16 tokens, so that short sequences have several: the interpreter scans one token at a time."""
    monkeypatch.setitem(scan.GAE_TILE, "BLOCK", 16)


def run(rewards, values, mask, **options):
    arguments = to_device((rewards, values, mask))
    got = gae(*arguments, **to_device(options), backend="triton")
    assert all(x.device == arguments[0].device for x in got)
    return type(got)(*(x.cpu() for x in got))


@pytest.mark.parametrize("ends", INVALID_CU_SEQLENS)
def test_invalid_cu_seqlens_do_not_read_outside_the_tokens(ends, monkeypatch):
    def arguments(x, mask, ends):
        return x, x, mask, 1.0, 0.95, None, True, ends

    check_invalid_cu_seqlens(kernels("triton").gae, arguments, ends, monkeypatch)


@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("tile", [4, 8])
def test_every_mask_of_five_tokens_exactly(monkeypatch, holes, bootstrap, tile):
    """With γ = λ = 1/2 and small multiples of 1/2 no operation rounds, so the results equal the definition."""
    monkeypatch.setitem(scan.GAE_TILE, "BLOCK", tile)
    mask = torch.tensor(list(itertools.product((False, True), repeat=5)))
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randint(-8, 9, mask.shape, generator=g) / 2 for _ in range(2))
    rewards, values = torch.where(mask, rewards, NAN), torch.where(mask, values, INF)
    start = torch.randint(-8, 9, (len(mask),), generator=g) / 2 if bootstrap else None
    options = {"gamma": 0.5, "lam": 0.5, "holes": holes, "bootstrap": start}
    for x, y in zip(
        run(rewards, values, mask, **options), reference.gae(rewards, values, mask, **options), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 15), (2, 16), (3, 33), (2, 75)])
def test_against_float64(small_tiles, mask, holes, b, t):
    rewards, values, m = batch(b, t, mask)
    discounts = ((1.0, 0.95), (0.9, 0.0), (0.99, 1.0), (1.0, 1.0), (0.0, 0.5))
    for i, (gamma, lam) in enumerate(discounts):
        bootstrap = torch.randn(b, generator=torch.Generator().manual_seed(1)) if i % 2 else None
        options = {"gamma": gamma, "lam": lam, "holes": holes}
        got = run(rewards, values, m, **options, bootstrap=bootstrap)
        eager = reference.gae(rewards, values, m, **options, bootstrap=bootstrap)
        wide = None if bootstrap is None else bootstrap.double()
        exact = reference.gae(rewards.double(), values.double(), m, **options, bootstrap=wide)
        # The values of the next state and of this state nearly cancel.
        scale = torch.where(m, values, 0).abs().max().item()
        for name in got._fields:
            check_error(name, getattr(got, name), getattr(eager, name), getattr(exact, name), scale)
            assert getattr(got, name).dtype == torch.float32


def test_the_rounding_error_of_the_decay_does_not_accumulate_per_token():
    """The error of float32(0.9941) is 2.6e-8. Over 170 tokens it would become a relative error of 4.3e-6."""
    rewards, values = torch.full((1, 2500), 0.5), torch.zeros(1, 2500)
    mask = torch.ones(1, 2500, dtype=torch.bool)
    got = run(rewards, values, mask, gamma=0.9941, lam=1.0)
    exact = reference.gae(rewards.double(), values.double(), mask, gamma=0.9941, lam=1.0)
    assert (got.advantages / exact.advantages - 1).abs().max() < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_tiles_of_full_size(holes):
    rewards, values, m = batch(1, 2 * scan.GAE_TILE["BLOCK"] + 100, "response with a hole", seed=3)
    got = run(rewards, values, m, holes=holes)
    exact = reference.gae(rewards.double(), values.double(), m, holes=holes)
    eager = reference.gae(rewards, values, m, holes=holes)
    for name in got._fields:
        check_error(name, getattr(got, name), getattr(eager, name), getattr(exact, name))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_packed_gives_the_bits_of_padded(small_tiles, mask, holes):
    b, t = 6, 50
    rewards, values, m = batch(b, t, mask)
    bootstrap = torch.randn(b, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([0, 1, t, 17, 0, 48])
    inside = torch.arange(t) < lengths[:, None]
    m = m & inside
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    padded = run(rewards, values, m, bootstrap=bootstrap, holes=holes)
    packed = run(rewards[inside], values[inside], m[inside], bootstrap=bootstrap, holes=holes, cu_seqlens=cu)
    for x, y in zip(packed, padded, strict=True):
        assert torch.equal(x, y[inside])
        assert not y[~inside].any()


@pytest.mark.parametrize("mask", ["all", "holes"])
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_lambda_per_sequence(small_tiles, mask, holes):
    """A row has the bits of its λ as a number, and decoupled returns those of a second pass."""
    rewards, values, m = batch(4, 50, mask)
    lam, options = torch.tensor([0.95, 0.0, 1.0, 0.5]), {"gamma": 0.99, "holes": holes}
    got = run(rewards, values, m, lam=lam, value_lam=1.0, **options)
    for i in range(4):
        row = slice(i, i + 1)
        one = run(rewards[row], values[row], m[row], lam=lam[i].item(), **options)
        assert torch.equal(got.advantages[row], one.advantages)
    assert torch.equal(got.returns, run(rewards, values, m, lam=1.0, **options).returns)
    packed = run(
        *(x.flatten() for x in (rewards, values, m)), lam=lam, value_lam=1.0, **options,
        cu_seqlens=torch.arange(5, dtype=torch.int32) * 50,
    )  # fmt: skip
    assert all(torch.equal(x, y.flatten()) for x, y in zip(packed, got, strict=True))


def test_bits_do_not_depend_on_other_rows_padding_or_repetition(small_tiles):
    rewards, values, m = batch(4, 45, "holes")
    whole = run(rewards, values, m)
    assert all(map(torch.equal, whole, run(rewards, values, m)))
    longer = (
        torch.nn.functional.pad(x, (0, 30), value=fill) for x, fill in ((rewards, NAN), (values, INF), (m, False))
    )
    assert all(torch.equal(x, y[:, :45]) for x, y in zip(whole, run(*longer), strict=True))
    alone = run(rewards[2:3], values[2:3], m[2:3])
    assert all(torch.equal(x[2:3], y) for x, y in zip(whole, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(small_tiles, dtype):
    rewards, values, m = batch(3, 40, "holes")
    rewards, values = rewards.to(dtype), values.to(dtype)
    expected = run(rewards.float(), values.float(), m)
    assert all(map(torch.equal, run(rewards, values, m), expected))
    turned = (x.T.contiguous().T for x in (rewards, values, m))
    assert all(map(torch.equal, run(*turned), expected))


@pytest.mark.parametrize(("b", "t"), [(0, 5), (3, 0), (0, 0)])
def test_empty(b, t):
    x = torch.zeros(b, t)
    got = run(x, x, x.bool())
    assert got.advantages.shape == got.returns.shape == (b, t)
    x = x.flatten()
    none = run(x, x, x.bool(), cu_seqlens=torch.zeros(1, dtype=torch.int32))
    assert none.advantages.shape == (0,)


def test_a_nan_reward_reaches_only_earlier_tokens(small_tiles):
    """A NaN reward of an action reaches the actions before it, also in earlier tiles, and none after it."""
    rewards, values, m = batch(2, 40, "all")
    clean = run(rewards, values, m)
    rewards[1, 20] = NAN
    got = run(rewards, values, m)
    assert got.advantages[1, :21].isnan().all()
    assert torch.equal(got.advantages[1, 21:], clean.advantages[1, 21:])
    assert torch.equal(got.advantages[0], clean.advantages[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("b", "t"), [(3, 70_000), (2, 131_072)])
def test_rows_longer_than_a_grid_axis(b, t):
    rewards, values, m = batch(b, t, "response with a hole")
    got = run(rewards, values, m, gamma=0.99)
    exact = reference.gae(rewards.double(), values.double(), m, gamma=0.99)
    eager = reference.gae(rewards, values, m, gamma=0.99)
    for name in got._fields:
        check_error(name, getattr(got, name), getattr(eager, name), getattr(exact, name))


@pytest.mark.gpu
def test_more_than_two_to_the_31_tokens():
    b, t = 2**11 + 1, 2**20
    if torch.cuda.mem_get_info()[1] < 60e9:
        pytest.skip("needs 60 GB")
    rewards, values = (torch.empty(b, t, device=DEVICE).normal_() for _ in range(2))
    mask = torch.ones(b, t, dtype=torch.bool, device=DEVICE)
    got = gae(rewards, values, mask, backend="triton")
    for row in (0, -1):
        alone = gae(*(x[row][None] for x in (rewards, values, mask)), backend="triton")
        assert all(torch.equal(x[row][None], y) for x, y in zip(got, alone, strict=True))


@pytest.mark.gpu
def test_graph_capture():
    rewards, values, m = to_device(batch(4, 3000, "holes"))
    expected = gae(rewards, values, m, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gae(rewards, values, m, backend="triton")
    graph.replay()
    assert all(map(torch.equal, got, expected))
