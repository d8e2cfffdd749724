"""`gae`: hand-computed numbers, float64, masks with holes, padded against packed, strides and threads."""

import pytest
import torch

from rlhf_kernels import gae, length_adaptive_lam, reference

from .helpers.advantages import INF, MASKS, NAN, batch
from .helpers.bounds import check_error


@pytest.mark.parametrize(
    ("mask", "options", "advantages", "returns"),
    [
        # δ_2 = 2 - 1.5, δ_1 = .5 * 1.5 - 1, δ_0 = 1 + .5 * 1 - .5; γλ = .25
        ([1, 1, 1], {}, [0.96875, -0.125, 0.5], [1.46875, 0.875, 2.0]),
        # δ_2 = 2 + .5 * 4 - 1.5
        ([1, 1, 1], {"bootstrap": [4.0]}, [1.09375, 0.375, 2.5], [1.59375, 1.375, 4.0]),
        # the hole is skipped: δ_0 = 1 + .5 * 1.5 - .5, A_0 = 1.25 + .25 * .5
        ([1, 0, 1], {"holes": "skip"}, [1.375, 0.0, 0.5], [1.875, 0.0, 2.0]),
        # a step of reward 0 and value 0: carry .5 * 1.5 + .25 * .5 = .875, A_0 = .5 + .25 * .875
        ([1, 0, 1], {"holes": "zero"}, [0.71875, 0.0, 0.5], [1.21875, 0.0, 2.0]),
        # padding is not a hole: the value after the last action is the bootstrap, not half of it
        ([1, 1, 0], {"holes": "zero", "bootstrap": [4.0]}, [1.25, 1.0, 0.0], [1.75, 2.0, 0.0]),
        ([0, 1, 0], {"bootstrap": [4.0]}, [0.0, 1.0, 0.0], [0.0, 2.0, 0.0]),
        ([0, 0, 0], {"bootstrap": [4.0]}, [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_by_hand(isa, backend, mask, options, advantages, returns):
    if "bootstrap" in options:
        options = options | {"bootstrap": torch.tensor(options["bootstrap"])}
    mask = torch.tensor([mask], dtype=torch.bool)
    rewards = torch.where(mask, torch.tensor([[1.0, 0.0, 2.0]]), NAN)
    values = torch.where(mask, torch.tensor([[0.5, 1.0, 1.5]]), INF)
    got = gae(rewards, values, mask, gamma=0.5, lam=0.5, **options, backend=backend)
    assert got.advantages.tolist() == [advantages]
    assert got.returns.tolist() == [returns]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (3, 15), (4, 16), (5, 33), (2, 1024), (2, 1100)])
def test_against_float64(isa, mask, holes, b, t):
    rewards, values, m = batch(b, t, mask)
    discounts = ((1.0, 0.95), (0.9, 0.0), (0.99, 1.0), (1.0, 1.0), (0.0, 0.5))
    for gamma, lam in discounts if t < 100 else discounts[:1]:
        for bootstrap in (None, torch.randn(b, generator=torch.Generator().manual_seed(1))):
            options = {"gamma": gamma, "lam": lam, "holes": holes}
            got = gae(rewards, values, m, **options, bootstrap=bootstrap, backend="cpu")
            eager = reference.gae(rewards, values, m, **options, bootstrap=bootstrap)
            wide = None if bootstrap is None else bootstrap.double()
            exact = reference.gae(rewards.double(), values.double(), m, **options, bootstrap=wide)
            for name in got._fields:
                check_error(name, getattr(got, name), getattr(eager, name), getattr(exact, name))
                assert getattr(got, name).dtype == torch.float32


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_packed_is_bit_identical_to_padded(isa, mask, holes):
    b, t = 6, 1100
    rewards, values, m = batch(b, t, mask)
    bootstrap = torch.randn(b)
    lengths = torch.tensor([0, 1, t, 17, 0, 1030])
    inside = torch.arange(t) < lengths[:, None]
    m = m & inside
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    padded = gae(rewards, values, m, bootstrap=bootstrap, holes=holes)
    packed = gae(rewards[inside], values[inside], m[inside], bootstrap=bootstrap, holes=holes, cu_seqlens=cu)
    for x, y in zip(packed, padded, strict=True):
        assert torch.equal(x, y[inside])
    exact = reference.gae(
        rewards[inside].double(), values[inside].double(), m[inside], bootstrap=bootstrap, holes=holes, cu_seqlens=cu
    )
    torch.testing.assert_close(packed.advantages.double(), exact.advantages, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_widened(isa, dtype):
    rewards, values, m = batch(3, 70, "right padding")
    rewards, values = rewards.to(dtype), values.to(dtype)
    got = gae(rewards, values, m)
    assert got.advantages.dtype == got.returns.dtype == torch.float32
    assert all(map(torch.equal, got, gae(rewards.float(), values.float(), m)))


def test_float64_stays():
    rewards, values, m = batch(2, 9, "holes")
    assert gae(rewards.double(), values.double(), m).advantages.dtype == torch.float64


def test_strides_do_not_matter(isa):
    rewards, values, m = batch(5, 40, "holes")
    expected = gae(rewards, values, m)
    wide = torch.stack([values, values], -1)
    got = gae(rewards.T.contiguous().T, wide[..., 1], m.T.contiguous().T)
    assert all(map(torch.equal, got, expected))


def test_threads_and_repetition_do_not_matter(isa):
    rewards, values, m = batch(40, 2500, "response with a hole")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gae(rewards, values, m)
        torch.set_num_threads(2)
        two, again = gae(rewards, values, m), gae(rewards, values, m)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))
    assert all(map(torch.equal, two, again))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("b", "t"), [(0, 5), (3, 0), (0, 0)])
def test_empty(backend, b, t):
    x = torch.zeros(b, t)
    got = gae(x, x, x.bool(), backend=backend)
    assert got.advantages.shape == got.returns.shape == (b, t)
    none = gae(
        x.flatten(), x.flatten(), x.bool().flatten(), cu_seqlens=torch.zeros(1, dtype=torch.int32), backend=backend
    )
    assert none.advantages.shape == (0,)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("options", "advantages", "returns"),
    [
        # δ = 1.5, .5, .5; λ = .5 for the advantages. With λ = 1 the returns are the sums of the rewards.
        ({"lam": 0.5, "value_lam": 1.0}, [1.875, 0.75, 0.5], [3.0, 2.0, 2.0]),
        ({"lam": 0.5, "value_lam": 0.0}, [1.875, 0.75, 0.5], [2.0, 1.5, 2.0]),
        # γ = .5 of the returns: δ = 1, -.25, .5, and γλ = .25 or 0
        ({"lam": 0.5, "value_gamma": 0.5}, [1.875, 0.75, 0.5], [1.46875, 0.875, 2.0]),
        ({"lam": 0.5, "value_gamma": 0.5, "value_lam": 0.0}, [1.875, 0.75, 0.5], [1.5, 0.75, 2.0]),
        ({"lam": torch.tensor([0.0])}, [1.5, 0.5, 0.5], [2.0, 1.5, 2.0]),
        ({"lam": torch.tensor([0.5]), "value_lam": torch.tensor([1.0])}, [1.875, 0.75, 0.5], [3.0, 2.0, 2.0]),
    ],
)
def test_lambda_of_policy_and_value_by_hand(isa, backend, options, advantages, returns):
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    got = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), **options, backend=backend)
    assert got.advantages.tolist() == [advantages]
    assert got.returns.tolist() == [returns]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_lambda_per_sequence(isa, mask, holes):
    """A row has the bits of its λ as a number, padded and packed, and agrees with the float64 definition."""
    b, t = 5, 1100
    rewards, values, m = batch(b, t, mask)
    lam, bootstrap = torch.tensor([0.95, 0.0, 1.0, 0.5, 0.999]), torch.randn(b)
    options = {"gamma": 0.99, "holes": holes}
    got = gae(rewards, values, m, lam=lam, bootstrap=bootstrap, **options)
    for i in range(b):
        one = gae(
            rewards[i : i + 1],
            values[i : i + 1],
            m[i : i + 1],
            lam=lam[i].item(),
            bootstrap=bootstrap[i : i + 1],
            **options,
        )
        assert all(torch.equal(x[i : i + 1], y) for x, y in zip(got, one, strict=True))
    cu = torch.arange(b + 1, dtype=torch.int32) * t
    flat = (x.flatten() for x in (rewards, values, m))
    packed = gae(*flat, lam=lam, bootstrap=bootstrap, cu_seqlens=cu, **options)
    assert all(torch.equal(x, y.flatten()) for x, y in zip(packed, got, strict=True))
    eager = reference.gae(rewards, values, m, lam=lam, bootstrap=bootstrap, **options)
    exact = reference.gae(
        rewards.double(), values.double(), m, lam=lam.double(), bootstrap=bootstrap.double(), **options
    )
    for name in got._fields:
        check_error(name, getattr(got, name), getattr(eager, name), getattr(exact, name))


def test_decoupled_is_two_passes(isa):
    rewards, values, m = batch(3, 70, "holes")
    lam = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    got = gae(rewards, values, m, gamma=0.9, lam=lam, value_lam=1.0, value_gamma=0.99)
    assert torch.equal(got.advantages, gae(rewards, values, m, gamma=0.9, lam=lam.float()).advantages)
    assert torch.equal(got.returns, gae(rewards, values, m, gamma=0.99, lam=1.0).returns)


def test_length_adaptive_lam_by_hand():
    """1 - 1 / (.05 * 40) = .5 and 1 - 1 / (.05 * 200) = .9; 20 actions give 0, and fewer would give less."""
    lengths = [40, 200, 20, 5, 0]
    mask = torch.arange(230) < torch.tensor(lengths)[:, None]
    mask[1] = torch.arange(230) % 23 != 0
    mask[1, -20:] = False
    assert mask[1].sum() == 200  # holes are not counted
    expected = torch.tensor([0.5, 0.9, 0.0, 0.0, 0.0])
    assert torch.equal(length_adaptive_lam(mask), expected)
    assert torch.equal(length_adaptive_lam(mask, alpha=0.1), torch.tensor([0.75, 0.95, 0.5, 0.0, 0.0]))
    cu = torch.arange(6, dtype=torch.int32) * 230
    assert torch.equal(length_adaptive_lam(mask.flatten(), cu_seqlens=cu), expected)
    assert length_adaptive_lam(mask[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("name", "mask", "options"),
    [
        ("mask", torch.ones(2, 3), {}),
        ("mask", torch.ones(3, dtype=torch.bool), {}),
        ("alpha", torch.ones(2, 3, dtype=torch.bool), {"alpha": 0.0}),
        ("cu_seqlens", torch.ones(3, dtype=torch.bool), {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}),
    ],
)
def test_mistakes_of_length_adaptive_lam_are_named(name, mask, options):
    with pytest.raises(ValueError, match=f"^{name}: got .*"):
        length_adaptive_lam(mask, **options)


def test_no_gradient():
    rewards, values, m = batch(2, 9, "all")
    for backend in ("reference", "cpu"):
        got = gae(rewards.requires_grad_(), values.requires_grad_(), m, backend=backend)
        assert not got.advantages.requires_grad
        assert not got.returns.requires_grad


BAD = {
    "rewards": [{"rewards": torch.zeros(2, 3, 4)}, {"rewards": torch.zeros(2, 3, dtype=torch.int64)}, {"rewards": 1.0}],
    "values": [{"values": torch.zeros(2, 4)}, {"values": torch.zeros(2, 3, dtype=torch.int32)}],
    "mask": [{"mask": torch.ones(2, 3)}, {"mask": torch.ones(3, 2, dtype=torch.bool)}],
    "bootstrap": [{"bootstrap": torch.zeros(3)}],
    "gamma": [{"gamma": 1.5}, {"gamma": -0.1}, {"gamma": NAN}],
    "lam": [{"lam": 2}, {"lam": torch.zeros(3)}, {"lam": torch.tensor([0.5, NAN])}, {"lam": torch.ones(2).long()}],
    "value_gamma": [{"value_gamma": -1.0}, {"value_gamma": torch.ones(2)}],
    "value_lam": [{"value_lam": 1.01}, {"value_lam": torch.ones(2, 1)}, {"value_lam": torch.tensor([0.5, 1.5])}],
    "holes": [{"holes": "none"}],
    "backend": [{"backend": "cuda9"}],
}


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, changes in BAD.items() for c in changes])
def test_mistakes_are_named(name, change):
    good = {"rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match=f"^{name}: got .*"):
        gae(**(good | change))


@pytest.mark.parametrize("cu", [[0, 2], [1, 3], [0, 2, 1, 3], [0, 4]])
def test_cu_seqlens_that_do_not_fit(cu):
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        gae(x, x, x.bool(), cu_seqlens=torch.tensor(cu, dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        gae(x, x, x.bool(), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="rewards: got"):
        gae(x, x, x.bool())


def test_kernel_checks_cu_seqlens_in_a_compiled_graph():
    """In a compiled graph the public check cannot read values; the kernel must not access memory out of bounds."""
    x, mask = torch.zeros(8), torch.ones(8, dtype=torch.bool)
    compiled = torch.compile(lambda ends: gae(x, x, mask, cu_seqlens=ends).advantages, fullgraph=True, backend="eager")
    assert (compiled(torch.tensor([0, 8], dtype=torch.int32)) == 0).all()
    for ends in ([0, 50_000_000], [0, 2], [1, 8]):
        with pytest.raises(ValueError, match="cu_seqlens: got"):
            compiled(torch.tensor(ends, dtype=torch.int32))


def test_registered_op():
    rewards, values, m = batch(3, 20, "holes")
    rewards, values = rewards.nan_to_num(), torch.where(m, values, 0)
    op = torch.ops.rlhf_kernels.gae.default
    torch.library.opcheck(op, (rewards, values, m, 1.0, 0.95, None, torch.randn(3), True, None, "cpu"))
    cu = torch.tensor([0, 5, 5, 60], dtype=torch.int32)
    torch.library.opcheck(
        op, (rewards.flatten(), values.flatten(), m.flatten(), 1.0, 0.0, torch.rand(3), None, False, cu, "cpu")
    )


def test_compiles_as_one_graph_for_every_length():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *x: gae(*x, bootstrap=x[0][:, 0]), fullgraph=True, backend=count)
    for t in (20, 31, 44, 1025):
        rewards, values, m = batch(3, t, "all")
        expected = gae(rewards, values, m, bootstrap=rewards[:, 0])
        assert all(map(torch.equal, compiled(rewards, values, m), expected))
    assert len(graphs) <= 2  # one for the first length and one for all others


def test_lambda_of_the_length_compiles():
    rewards, values, m = batch(3, 60, "right padding")

    def estimate(rewards, values, m):
        return gae(rewards, values, m, lam=length_adaptive_lam(m), value_lam=1.0)

    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(rewards, values, m), estimate(rewards, values, m)))
