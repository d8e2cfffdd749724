"""`gae` with one program per tile: the bits of one program per row, and errors against float64."""

import pytest
import torch

from rlhf_kernels import gae, reference
from rlhf_kernels._triton import gae as launcher
from rlhf_kernels._triton import scan
from rlhf_kernels.trials import trial

from .helpers.advantages import MASKS, NAN, batch
from .helpers.bounds import check_error
from .helpers.gpu import DEVICE, to_device


@pytest.fixture
def launches(monkeypatch):
    """Split rows of two tiles of 16 tokens or more, with maps in groups of two; return a list that counts the split calls."""
    made, module = [], launcher.__globals__
    monkeypatch.setitem(scan.GAE_TILE, "BLOCK", 16)
    monkeypatch.setitem(module, "FEWEST_TILES", 2)
    monkeypatch.setitem(module, "GROUP", 2)
    original = module["_gae_of_tiles"]
    monkeypatch.setitem(module, "_gae_of_tiles", lambda *args: made.append(original(*args)))
    return made


def run(rewards, values, mask, **options):
    arguments, options = to_device((rewards, values, mask)), to_device(options)
    whole = gae(*arguments, **options, backend="triton")
    with trial("gae_split"):
        split = gae(*arguments, **options, backend="triton")
    return whole, split


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_the_bits_of_one_program_per_row(launches, mask, holes):
    for t, bootstrap, lam in ((32, False, 0.95), (75, True, torch.tensor([0.95, 0.0, 1.0]))):
        rewards, values, m = batch(3, t, mask, seed=t)
        start = torch.tensor([0.5, -0.0, -2.0]) if bootstrap else None
        whole, split = run(rewards, values, m, gamma=0.99, lam=lam, holes=holes, bootstrap=start)
        assert all(map(torch.equal, whole, split))
    assert len(launches) == 2


@pytest.mark.parametrize("mask", ["all", "response with a hole"])
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_against_float64(launches, mask, holes):
    rewards, values, m = batch(1, 100, mask)
    options = {"gamma": 0.99, "lam": 0.95, "holes": holes}
    _, got = run(rewards, values, m, **options)
    eager = reference.gae(rewards, values, m, **options)
    exact = reference.gae(rewards.double(), values.double(), m, **options)
    for name in got._fields:
        check_error(name, getattr(got, name).cpu(), getattr(eager, name), getattr(exact, name))
    assert launches


def test_a_nan_reward_reaches_only_earlier_tokens(launches):
    rewards, values, m = batch(2, 80, "all")
    _, clean = run(rewards, values, m)
    rewards[1, 40] = NAN
    _, got = run(rewards, values, m)
    assert got.advantages[1, :41].isnan().all()
    assert torch.equal(got.advantages[1, 41:], clean.advantages[1, 41:])
    assert torch.equal(got.advantages[0], clean.advantages[0])


def test_decoupled_returns_and_half_precision(launches):
    rewards, values, m = batch(2, 50, "holes")
    for dtype in (torch.float32, torch.bfloat16):
        whole, split = run(rewards.to(dtype), values.to(dtype), m, value_lam=1.0, value_gamma=0.9)
        assert all(map(torch.equal, whole, split))
    assert len(launches) == 4


def test_short_rows_many_rows_and_packed_tokens_are_not_split(launches, monkeypatch):
    rewards, values, m = batch(4, 31, "holes")
    run(rewards, values, m)
    tokens = (x.flatten() for x in batch(1, 64, "holes"))
    run(*tokens, cu_seqlens=torch.tensor([0, 64], dtype=torch.int32))
    run(*(x[:0] for x in batch(4, 64, "holes")))
    monkeypatch.setitem(launcher.__globals__, "ROW_SHARE", 0.001)
    run(*batch(4, 64, "holes"))
    assert not launches


def test_without_the_trial_no_row_is_split(launches):
    gae(*to_device(batch(2, 64, "holes")), backend="triton")
    assert not launches


@pytest.mark.gpu
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_full_size_on_a_device(holes):
    rewards, values, m = batch(64, 131_072, "response with a hole")
    whole, split = run(rewards, values, m, gamma=0.99, holes=holes)
    assert all(map(torch.equal, whole, split))
    again = run(rewards, values, m, gamma=0.99, holes=holes)[1]
    assert all(map(torch.equal, again, split))


@pytest.mark.gpu
def test_graph_capture():
    tokens = to_device(batch(4, 20_000, "holes"))
    with trial("gae_split"):
        expected = gae(*tokens, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = gae(*tokens, backend="triton")
    graph.replay()
    assert all(map(torch.equal, got, expected))
    assert got.advantages.device.type == DEVICE.type
