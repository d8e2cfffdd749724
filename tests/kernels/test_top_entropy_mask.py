"""`top_entropy_mask`: by hand, torch's quantile, ties, the fused head, errors."""

import math

import pytest
import torch

from rlhf_kernels import linear_ppo_loss, reference, top_entropy_mask

from .helpers.heads import make

BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("share", "threshold", "kept"),
    [
        (1.0, 1.0, [1, 1, 1, 1, 1]),
        (0.8, 1.8, [0, 1, 1, 1, 1]),
        (0.75, 2.0, [0, 1, 1, 1, 1]),
        (0.5, 3.0, [0, 0, 1, 1, 1]),
        (0.2, 5.6, [0, 0, 0, 0, 1]),
        (0.0, 8.0, [0, 0, 0, 0, 1]),
    ],
)
def test_by_hand(isa, backend, share, threshold, kept):
    """Entropies 1, 2, 3, 5, 8: the place of the threshold is 4 (1 - share), between two of them."""
    order = torch.tensor([3, 0, 4, 1, 2])
    entropy = torch.tensor([1.0, 2.0, 3.0, 4.0 + 1, 8.0])[order]
    entropy = torch.stack((entropy, torch.tensor([9.0, math.nan, -1.0, 99.0, 0.0])))
    mask = torch.tensor([[True] * 5, [False] * 5])
    got = top_entropy_mask(entropy, mask, entropy_quantile=share, backend=backend)
    assert got.mask.int().tolist() == [[kept[i] for i in order], [0] * 5]
    expected = {"entropy_threshold": threshold, "rejected_share": 1 - sum(kept) / 5, "num_tokens": 5}
    assert {k: float(x) for k, x in got.metrics.items()} == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.013, 0.2, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(("n", "keep"), [(1, 1.0), (2, 1.0), (40, 0.6), (10_001, 0.5)])
def test_against_the_quantile_of_torch(isa, share, n, keep):
    g = torch.Generator().manual_seed(n)
    entropy, mask = torch.rand(n, generator=g) * 5, torch.rand(n, generator=g) <= keep
    threshold = torch.quantile(entropy[mask].double(), 1 - share)
    for backend in BACKENDS:
        got = top_entropy_mask(entropy, mask, entropy_quantile=share, backend=backend)
        assert float(got.metrics["entropy_threshold"]) == pytest.approx(float(threshold), rel=1e-6)
        assert torch.equal(got.mask, mask & (entropy.double() >= threshold - 1e-12))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_of_kept_tokens_has_no_rounding_error(isa, backend):
    """The place 10 (1 - 0.7) is 3, not 3.0000000000000004, which would drop one token more."""
    entropy = torch.arange(11.0)
    got = top_entropy_mask(entropy, torch.ones(11, dtype=torch.bool), entropy_quantile=0.7, backend=backend)
    assert got.mask.sum() == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_are_kept_together(isa, backend):
    entropy, mask = torch.tensor([0.5, 0.1, 0.5, 0.5, 0.2]), torch.ones(5, dtype=torch.bool)
    got = top_entropy_mask(entropy, mask, entropy_quantile=0.2, backend=backend)
    assert got.mask.tolist() == [True, False, True, True, False]
    same = top_entropy_mask(torch.full((7,), 0.3), mask.new_ones(7), entropy_quantile=0.01, backend=backend)
    assert same.mask.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_select_and_nan(isa, backend):
    for shape in ((0,), (2, 0), (2, 3)):
        x, mask = torch.ones(shape), torch.zeros(shape, dtype=torch.bool)
        got = top_entropy_mask(x, mask, entropy_quantile=0.2, backend=backend)
        assert got.mask.shape == shape and not got.mask.any()
        assert all(value == 0 for value in got.metrics.values())
    x, mask = torch.tensor([1.0, math.nan, 3.0]), torch.ones(3, dtype=torch.bool)
    for share in (0.5, 1.0):
        got = top_entropy_mask(x, mask, entropy_quantile=share, backend=backend)
        assert not got.mask.any() and got.metrics["entropy_threshold"].isnan() and got.metrics["rejected_share"] == 1


def test_strides_and_half_precision(isa):
    x, mask = torch.rand(6, 10), torch.rand(6, 10) < 0.6
    expected = top_entropy_mask(x, mask, entropy_quantile=0.3).mask
    assert torch.equal(top_entropy_mask(x.T, mask.T, entropy_quantile=0.3).mask, expected.T)
    got = top_entropy_mask(x.bfloat16().requires_grad_(), mask, entropy_quantile=0.3)
    assert torch.equal(got.mask, top_entropy_mask(x.bfloat16().float(), mask, entropy_quantile=0.3).mask)
    assert got.metrics["entropy_threshold"].dtype == torch.float32


def test_rows_with_a_low_entropy_are_in_no_product(monkeypatch):
    seen, mm = [], torch.mm

    def counted(a, b, **kwargs):
        seen.append((tuple(a.shape), tuple(b.shape)))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counted)
    leaves, constants, _ = make(5, b=16, t=40, drift=0.0)
    hidden, weight = (leaves[k].requires_grad_() for k in ("hidden", "weight"))
    entropy = torch.rand(16, 40, generator=torch.Generator().manual_seed(0))
    kept = top_entropy_mask(entropy, constants["mask"], entropy_quantile=0.2).mask
    seen.clear()
    linear_ppo_loss(hidden, weight, **constants | {"mask": kept}, chunk_tokens=32).loss.backward()
    count, shape = int(kept.sum()), tuple(weight.shape)
    assert count == pytest.approx(0.2 * constants["mask"].sum(), abs=1)
    assert count <= sum(a[0] for a, b in seen if b == shape[::-1]) < count + 16


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("entropy", {"entropy": torch.zeros(3).long()}),
        ("mask", {"mask": torch.zeros(4).bool()}),
        ("mask", {"mask": torch.zeros(3)}),
        ("entropy_quantile", {"entropy_quantile": 1.5}),
        ("entropy_quantile", {"entropy_quantile": -0.1}),
        ("entropy_quantile", {"entropy_quantile": None}),
        ("backend", {"backend": "fast"}),
    ],
)
def test_mistakes_are_named(name, change):
    given = {"entropy": torch.zeros(3), "mask": torch.zeros(3).bool(), "entropy_quantile": 0.2}
    with pytest.raises(ValueError, match=f"^{name}: got .*"):
        top_entropy_mask(**given | change)


def test_registered_op_and_compile():
    x, mask = torch.rand(4, 9), torch.rand(4, 9) < 0.6
    torch.library.opcheck(torch.ops.rlhf_kernels.top_entropy_mask.default, (x, mask, 0.3, "cpu"))
    compiled = torch.compile(
        lambda a, m: top_entropy_mask(a, m, entropy_quantile=0.3), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, mask).mask, reference.top_entropy_mask(x, mask, entropy_quantile=0.3).mask)
