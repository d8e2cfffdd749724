"""`group_advantages`: hand-computed numbers, float64, and groups in any order and of any size."""

import math

import pytest
import torch

from rlhf_kernels import group_advantages, reference

from .helpers.bounds import check_error

KINDS = ("rloo", "grpo", "dr_grpo")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # group 7: scores 1, 3, 8 (mean 4, variance 13); group -2: one score of 5
        ("rloo", [1 - 5.5, 0.0, 3 - 4.5, 8 - 2.0]),
        ("grpo", [-3 / (math.sqrt(13) + 1e-4), 0.0, -1 / (math.sqrt(13) + 1e-4), 4 / (math.sqrt(13) + 1e-4)]),
        ("dr_grpo", [-3.0, 0.0, -1.0, 4.0]),
    ],
)
def test_by_hand(isa, backend, kind, expected):
    got = group_advantages(torch.tensor([1.0, 5.0, 3.0, 8.0]), torch.tensor([7, -2, 7, 7]), kind=kind, backend=backend)
    assert got.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("eps", "std", "divisor"),
    [
        (1e-6, "sample", math.sqrt(8) + 1e-6),  # verl
        (0.5, "population", 2 + 0.5),
    ],
)
def test_deviation_by_hand(isa, backend, eps, std, divisor):
    """Scores of 1 and 5: mean 3, sum of squares 8."""
    scores, groups = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0, 0, 1])
    got = group_advantages(scores, groups, kind="grpo", eps=eps, std=std, backend=backend)
    assert got.tolist() == pytest.approx([-2 / divisor, 2 / divisor, 0.0], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equal_scores_have_no_advantage(kind, backend):
    got = group_advantages(torch.full((6,), 0.1), torch.tensor([0, 0, 0, 1, 1, 1]), kind=kind, backend=backend)
    assert got.abs().max().item() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "groups"), [(1, 1), (2, 1), (8, 2), (37, 40), (1000, 13), (999, 999)])
def test_against_float64(isa, kind, n, groups):
    g = torch.Generator().manual_seed(n)
    scores, index = 3 * torch.randn(n, generator=g) + 1, torch.randint(0, groups, (n,), generator=g)
    got = group_advantages(scores, index, kind=kind, backend="cpu")
    exact = reference.group_advantages(scores.double(), index, kind=kind)
    check_error(kind, got, reference.group_advantages(scores, index, kind=kind), exact, scale=scores.abs().max().item())
    order = torch.randperm(n, generator=g)
    moved = group_advantages(scores[order], index[order] * 1000 - 7, kind=kind)
    check_error(kind, moved, got[order], exact[order], scale=scores.abs().max().item())
    assert torch.equal(group_advantages(scores, index.int(), kind=kind), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_strides_and_empty(dtype):
    wide = torch.randn(10, 2).to(dtype)
    index = torch.arange(20).view(10, 2)[:, 0] // 6
    got = group_advantages(wide[:, 1], index)
    assert got.dtype == torch.float32
    assert torch.equal(got, group_advantages(wide[:, 1].float().contiguous(), index.contiguous()))
    for backend in ("reference", "cpu"):
        assert group_advantages(wide[:0, 0], index[:0], backend=backend).shape == (0,)
        assert not group_advantages(wide[:, 0].requires_grad_(), index, backend=backend).requires_grad


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scores", {"scores": torch.zeros(3, 1)}),
        ("scores", {"scores": torch.zeros(3).long()}),
        ("groups", {"groups": torch.zeros(4).long()}),
        ("groups", {"groups": torch.zeros(3)}),
        ("kind", {"kind": "ppo"}),
        ("eps", {"kind": "grpo", "eps": 0.0}),
        ("eps", {"kind": "rloo", "eps": 1e-6}),
        ("std", {"kind": "grpo", "std": "biased"}),
        ("std", {"kind": "dr_grpo", "std": "population"}),
        ("backend", {"backend": "fast"}),
    ],
)
def test_mistakes_are_named(name, change):
    with pytest.raises(ValueError, match=f"^{name}: got .*"):
        group_advantages(**({"scores": torch.zeros(3), "groups": torch.zeros(3).long()} | change))


def test_registered_op_and_compile():
    scores, index = torch.randn(9), torch.arange(9) // 3
    torch.library.opcheck(torch.ops.rlhf_kernels.group_advantages.default, (scores, index, 1, 1e-6, True, "cpu"))
    compiled = torch.compile(lambda s, i: group_advantages(s, i, kind="grpo"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, index), group_advantages(scores, index, kind="grpo"))
