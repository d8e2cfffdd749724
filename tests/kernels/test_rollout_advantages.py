"""`rollout_advantages`: hand-computed numbers, positions of the score as in the peers, float64 and invariances."""

import itertools

import pytest
import torch

from rlhf_kernels import gae, reference, rollout_advantages

from .helpers.advantages import INF, MASKS, NAN, double, rollout
from .helpers.bounds import check_error

LOGPROBS, REF_LOGPROBS = [-1.0, -2.0, -1.5], [-1.5, -2.25, -1.0]  # k1: .5, .25, -.5
VALUES = [0.5, 0.25, -0.5]


def by_hand(mask=(1, 1, 1), score=2.0, **options):
    m = torch.tensor([mask], dtype=torch.bool)
    tokens = (torch.where(m, torch.tensor([x]), NAN) for x in (LOGPROBS, REF_LOGPROBS, VALUES))
    options = {"kl_coef": 0.5, "lam": 0.5, "whiten_advantages": False} | options
    return rollout_advantages(torch.tensor([score]), *tokens, m, **options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_by_hand(isa, backend):
    got = by_hand(score_clip=1.0, backend=backend)
    assert got.kl.tolist() == [[0.5, 0.25, -0.5]]
    assert got.rewards.tolist() == [[-0.25, -0.125, 0.25 + 1.0]]
    assert got.advantages.tolist() == [[-0.5, 0.0, 1.75]]  # δ = -.5, -.875, 1.75 and λ = .5
    assert got.returns.tolist() == [[0.0, 0.25, 1.25]]
    white = by_hand(score_clip=1.0, whiten_advantages=True, backend=backend)
    assert white.advantages.tolist()[0] == pytest.approx([-0.775880, -0.352673, 1.128553], abs=1e-6)
    assert white.returns.tolist() == got.returns.tolist()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("mask", "options", "rewards"),
    [
        ([1, 1, 1], {}, [-0.25, -0.125, 2.25]),
        ([1, 1, 0], {}, [-0.25, 1.875, 0.0]),  # the last True, not the last position
        ([1, 0, 1], {}, [-0.25, 0.0, 2.25]),
        ([0, 0, 0], {}, [0.0, 0.0, 0.0]),  # a row without an action drops its score
        ([1, 1, 1], {"score_index": [1]}, [-0.25, 1.875, 0.25]),
        ([1, 1, 0], {"score_index": [2]}, [-0.25, -0.125, 0.0]),  # a reward at a masked token is ignored
        ([1, 1, 1], {"score_clip": 0.5}, [-0.25, -0.125, 0.75]),
        ([1, 1, 1], {"score": -2.0, "score_clip": 0.5}, [-0.25, -0.125, -0.25]),
        ([1, 1, 1], {"kl_coef": 0.0}, [0.0, 0.0, 2.0]),
    ],
)
def test_position_of_the_score(isa, backend, mask, options, rewards):
    if "score_index" in options:
        options = options | {"score_index": torch.tensor(options["score_index"])}
    assert by_hand(mask, backend=backend, **options).rewards.tolist() == [rewards]


def test_last_action_of_a_short_response(isa):
    """A response of 5 of 8 positions with score 1, no KL and V = -.326 at the EOS action has the advantage 1.326 there.

    TRL classic, OpenRLHF and verl give the same number.
    """
    mask = torch.arange(8)[None] < 5
    values = torch.full((1, 8), -0.326)
    zeros = torch.zeros(1, 8)
    options = {"kl_coef": 0.1, "gamma": 1.0, "lam": 0.95, "whiten_advantages": False}
    got = rollout_advantages(torch.ones(1), zeros, zeros, values, mask, **options)
    assert got.advantages[0, 4].item() == pytest.approx(1.326, abs=1e-6)
    # Every δ before it is 0, so the advantage decays only by λ.
    assert got.advantages[0, :5].tolist() == pytest.approx([1.326 * 0.95**k for k in (4, 3, 2, 1, 0)], abs=1e-6)
    assert got.advantages[0, 5:].tolist() == [0.0] * 3


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("b", "t", "kl_estimator"),
    [(1, 1, "k1"), (3, 17, "k1"), (3, 17, "k2"), (3, 17, "k3"), (3, 17, "abs"), (2, 1100, "k3")],
)
def test_against_float64(isa, mask, b, t, kl_estimator):
    data = rollout(b, t, mask)
    combinations = list(itertools.product(("skip", "zero"), (False, True), (False, True)))
    for holes, rewards, advantages in combinations if t < 100 else combinations[3::4]:
        options = {
            "kl_coef": 0.1,
            "kl_estimator": kl_estimator,
            "gamma": 0.99,
            "holes": holes,
            "score_clip": 1.5,
            "whiten_rewards": rewards,
            "whiten_advantages": advantages,
        }
        bootstrap = torch.arange(b) / 2
        got = rollout_advantages(**data, **options, bootstrap=bootstrap, backend="cpu")
        eager = reference.rollout_advantages(**data, **options, bootstrap=bootstrap)
        exact = reference.rollout_advantages(**double(data), **options, bootstrap=bootstrap.double())
        for name in got._fields:
            check_error(name, getattr(got, name), getattr(eager, name), getattr(exact, name))
            assert getattr(got, name).dtype == torch.float32


def test_whitening_of_a_small_spread_around_a_large_mean(isa):
    """Sums of squares in float32 would lose a spread of 1 around a mean of 4096 completely."""
    b, t = 4, 3000
    rewards = 4096 + torch.randn(b, t, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    zeros, mask = torch.zeros(b, t), torch.ones(b, t, dtype=torch.bool)
    # γ = 0 and V = 0 make the advantage the reward itself, which is -kl_coef * (logprobs - 0).
    got = rollout_advantages(torch.zeros(b), rewards, zeros, zeros, mask, kl_coef=-1.0, gamma=0.0)
    exact = reference.masked_whiten(rewards.double(), mask)
    eager = reference.masked_whiten(rewards, mask)
    check_error("advantages", got.advantages, eager, exact)
    assert got.advantages.double().std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("count", [0, 1])
def test_whitening_of_zero_tokens_and_one_token(isa, backend, count):
    """A variance with n - 1 = 0 or -1 in the denominator is 0."""
    mask = torch.arange(4)[None] < count
    x = torch.ones(1, 4)
    got = rollout_advantages(torch.ones(1), x, x, x, mask, kl_coef=0.1, whiten_rewards=True, backend=backend)
    assert got.advantages.tolist() == [[0.0] * 4]
    assert got.rewards.tolist() == [[float(count), 0.0, 0.0, 0.0]]
    assert torch.isfinite(got.returns).all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_packed_is_bit_identical_to_padded(isa, mask, whiten_rewards):
    b, t = 6, 1100
    lengths = torch.tensor([0, 1, t, 17, 0, 1030])
    inside = torch.arange(t) < lengths[:, None]
    data = rollout(b, t, mask)
    data["mask"] = data["mask"] & inside
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    index = torch.tensor([0, 0, 999, 3, 0, 1029])
    for score_index in (None, index):
        options = {"kl_coef": 0.2, "whiten_rewards": whiten_rewards, "score_index": score_index}
        padded = rollout_advantages(**data, **options)
        tokens = {k: v if k == "scores" else v[inside] for k, v in data.items()}
        packed = rollout_advantages(**tokens, **options, cu_seqlens=cu)
        for x, y in zip(packed, padded, strict=True):
            assert torch.equal(x, y[inside])
        eager = reference.rollout_advantages(**tokens, **options, cu_seqlens=cu)
        exact = reference.rollout_advantages(**double(tokens), **options, cu_seqlens=cu)
        check_error("advantages", packed.advantages, eager.advantages, exact.advantages)


def test_threads_and_repetition_do_not_matter(isa):
    data = rollout(40, 2500, "response with a hole")
    options = {"kl_coef": 0.2, "whiten_rewards": True}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rollout_advantages(**data, **options)
        torch.set_num_threads(2)
        two, again = (rollout_advantages(**data, **options) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, two))
    assert all(map(torch.equal, two, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(isa, dtype):
    data = rollout(4, 60, "holes")
    narrow = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in narrow.items()}
    turned = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in narrow.items()}
    expected = rollout_advantages(**wide, kl_coef=0.1)
    assert all(x.dtype == torch.float32 for x in expected)
    assert all(map(torch.equal, rollout_advantages(**narrow, kl_coef=0.1), expected))
    assert all(map(torch.equal, rollout_advantages(**turned, kl_coef=0.1), expected))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("b", "t"), [(0, 5), (3, 0), (0, 0)])
def test_empty(backend, b, t):
    x = torch.zeros(b, t)
    got = rollout_advantages(torch.zeros(b), x, x, x, x.bool(), kl_coef=0.1, whiten_rewards=True, backend=backend)
    assert all(y.shape == (b, t) for y in got)


BAD = {
    "scores": [torch.zeros(3), torch.zeros(2, 1), 1.0],
    "logprobs": [torch.zeros(2, 3, 1), torch.zeros(2, 3).long()],
    "ref_logprobs": [torch.zeros(2, 4)],
    "values": [torch.zeros(3)],
    "mask": [torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.uint8)],
    "kl_estimator": ["k4"],
    "score_clip": [0.0, -1.0],
    "score_index": [torch.zeros(2), torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.zeros(3).long()],
    "bootstrap": [torch.zeros(1)],
    "gamma": [-1.0],
    "lam": [1.01],
    "holes": ["keep"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_mistakes_are_named(name, value):
    x = torch.zeros(2, 3)
    good = {"scores": x[:, 0], "logprobs": x, "ref_logprobs": x, "values": x, "mask": x.bool(), "kl_coef": 0.1}
    with pytest.raises(ValueError, match=f"^{name}: got .*"):
        rollout_advantages(**(good | {name: value}))


def test_kernel_checks_cu_seqlens_in_a_compiled_graph():
    x, mask, score = torch.zeros(8), torch.ones(8, dtype=torch.bool), torch.zeros(1)
    compiled = torch.compile(
        lambda ends: rollout_advantages(score, x, x, x, mask, kl_coef=0.1, cu_seqlens=ends).advantages,
        fullgraph=True,
        backend="eager",
    )
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        compiled(torch.tensor([0, 50_000_000], dtype=torch.int32))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lambda_of_policy_and_value_by_hand(isa, backend):
    """Rewards -.25, -.125, 1.25 give δ = -.5, -.875, 1.75; λ = .5 for the advantages and 1 for the returns."""
    for lam in (0.5, torch.tensor([0.5])):
        got = by_hand(score_clip=1.0, lam=lam, value_lam=1.0, backend=backend)
        assert got.advantages.tolist() == [[-0.5, 0.0, 1.75]]
        assert got.returns.tolist() == [[0.875, 1.125, 1.25]]  # sums of the rewards
    got = by_hand(score_clip=1.0, lam=1.0, value_lam=torch.tensor([0.5]), backend=backend)
    assert got.returns.tolist() == [[0.0, 0.25, 1.25]]


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_lambda_per_sequence_is_that_of_gae(isa, whiten_rewards, backend):
    d, b, t = rollout(4, 1100, "holes"), 4, 1100
    lam, options = torch.tensor([0.95, 0.0, 1.0, 0.5]), {"gamma": 0.99, "value_gamma": 1.0, "value_lam": 0.9}
    shared = {"kl_coef": 0.1, "whiten_advantages": False, "whiten_rewards": whiten_rewards, "backend": backend}
    got = rollout_advantages(**d, lam=lam, **options, **shared)
    expected = gae(got.rewards, d["values"], d["mask"], lam=lam, **options, backend=backend)
    assert torch.equal(got.advantages, expected.advantages)
    assert torch.equal(got.returns, expected.returns)
    cu = torch.arange(b + 1, dtype=torch.int32) * t
    tokens = {name: x if name == "scores" else x.flatten() for name, x in d.items()}
    packed = rollout_advantages(**tokens, lam=lam, **options, **shared, cu_seqlens=cu)
    assert all(torch.equal(x, y.flatten()) for x, y in zip(packed, got, strict=True))


@pytest.mark.parametrize("name", ["lam", "value_lam", "value_gamma"])
def test_invalid_lambda_is_named(name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        by_hand(**{name: 1.5 if name == "value_gamma" else torch.tensor([1.5])})


def test_registered_op():
    d = {k: torch.nan_to_num(v) for k, v in rollout(3, 20, "holes").items()}
    tensors = (d["scores"], d["logprobs"], d["ref_logprobs"], d["values"], d["mask"].bool())
    scalars = (0.1, 2, 1.0, 0.95, None, INF)
    op = torch.ops.rlhf_kernels.rollout_advantages.default
    torch.library.opcheck(op, (*tensors, *scalars, torch.zeros(3).long(), None, True, True, True, None, "cpu"))


def test_compiles_as_one_graph_for_every_length():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *x: rollout_advantages(*x, kl_coef=0.1), fullgraph=True, backend=count)
    for t in (20, 31, 44, 1025):
        data = tuple(rollout(3, t, "all").values())
        assert all(map(torch.equal, compiled(*data), rollout_advantages(*data, kl_coef=0.1)))
    assert len(graphs) <= 2
