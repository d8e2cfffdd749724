"""`rollout_advantages` in Triton: exact numbers, float64, tiles, padded against packed, and invariance of the bits."""

import itertools

import pytest
import torch

from rlhf_kernels import reference, rollout_advantages
from rlhf_kernels._triton import scan
from rlhf_kernels.backend import kernels

from .helpers.advantages import INF, INVALID_CU_SEQLENS, MASKS, NAN, check_invalid_cu_seqlens, double, rollout
from .helpers.bounds import check_error
from .helpers.gpu import DEVICE, to_device


def set_tile(monkeypatch, tokens: int) -> None:
    for options in (scan.ROLLOUT_TILE, scan.ROLLOUT_K3_TILE):
        monkeypatch.setitem(options, "BLOCK", tokens)


@pytest.fixture
def small_tiles(monkeypatch):
    """Use tiles of 16 tokens, so that short sequences have several: the interpreter scans one token at a time."""
    set_tile(monkeypatch, 16)


def run(data, **options):
    got = rollout_advantages(**to_device(data), **to_device(options), backend="triton")
    return type(got)(*(x.cpu() for x in got))


def exact_data() -> dict[str, torch.Tensor]:
    """Return every mask of five tokens and small multiples of 1/2: with γ = λ = kl_coef = 1/2 no operation rounds."""
    mask = torch.tensor(list(itertools.product((False, True), repeat=5)))
    g = torch.Generator().manual_seed(0)
    logprobs, ref_logprobs, values = (torch.randint(-8, 9, mask.shape, generator=g) / 2 for _ in range(3))
    return {
        "scores": torch.randint(-8, 9, (len(mask),), generator=g) / 2,
        "logprobs": torch.where(mask, logprobs, NAN),
        "ref_logprobs": torch.where(mask, ref_logprobs, -INF),
        "values": torch.where(mask, values, INF),
        "mask": mask,
    }


@pytest.mark.parametrize("ends", INVALID_CU_SEQLENS)
def test_invalid_cu_seqlens_do_not_read_outside_the_tokens(ends, monkeypatch):
    def arguments(x, mask, ends):
        scores = torch.zeros(len(ends) - 1, device=DEVICE)
        return scores, x, x, x, mask, 0.1, 0, 1.0, 0.95, torch.inf, None, None, True, False, False, ends

    check_invalid_cu_seqlens(kernels("triton").rollout_advantages, arguments, ends, monkeypatch)


@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_lambda_of_policy_and_value(monkeypatch, holes):
    """Multiples of 1/2 with γ = 1/2 and λ in 0, 1/2 and 1: no operation rounds."""
    set_tile(monkeypatch, 4)
    data = exact_data()
    lam = torch.arange(len(data["mask"])) % 3 / 2
    options = {"kl_coef": 0.5, "gamma": 0.5, "lam": lam, "holes": holes, "whiten_advantages": False}
    for value in ({}, {"value_lam": 1.0}, {"value_lam": 1 - lam, "value_gamma": 1.0}):
        got, expected = run(data, **options, **value), reference.rollout_advantages(**data, **options, **value)
        for name in got._fields:
            assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("tile", [4, 8])
@pytest.mark.parametrize("estimator", ["k1", "k2", "abs"])
@pytest.mark.parametrize("index", [None, 2])
@pytest.mark.parametrize("score_clip", [None, 1.5])
def test_the_token_that_receives_the_score(monkeypatch, tile, estimator, index, score_clip):
    """It is the last action or `score_index`. A score at a masked token, or in a row without an action, is dropped."""
    set_tile(monkeypatch, tile)
    data = exact_data()
    b = len(data["mask"])
    options = {
        "kl_coef": 0.5,
        "kl_estimator": estimator,
        "gamma": 0.5,
        "lam": 0.5,
        "score_clip": score_clip,
        "score_index": None if index is None else torch.full((b,), index),
        "bootstrap": torch.arange(b) / 2,
        "holes": "zero" if index else "skip",
        "whiten_advantages": False,
    }
    got, expected = run(data, **options), reference.rollout_advantages(**data, **options)
    for name in got._fields:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("b", "t", "kl_estimator"),
    [(1, 1, "k1"), (3, 17, "k1"), (3, 17, "k2"), (3, 17, "k3"), (3, 17, "abs"), (2, 50, "k3")],
)
def test_against_float64(small_tiles, mask, b, t, kl_estimator):
    data = rollout(b, t, mask)
    combinations = list(itertools.product(("skip", "zero"), (False, True), (False, True)))
    for holes, rewards, advantages in combinations if kl_estimator == "k1" else combinations[3::4]:
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
        got = run(data, **options, bootstrap=bootstrap)
        eager = reference.rollout_advantages(**data, **options, bootstrap=bootstrap)
        exact = reference.rollout_advantages(**double(data), **options, bootstrap=bootstrap.double())
        scale = torch.where(data["mask"], data["values"], 0).abs().max().item()
        for name in got._fields:
            check_error(name, getattr(got, name), getattr(eager, name), getattr(exact, name), scale)
            assert getattr(got, name).dtype == torch.float32


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_tiles_of_full_size(whiten_rewards):
    data = rollout(2, scan.ROLLOUT_TILE["BLOCK"] + 100, "response with a hole", seed=3)
    options = {"kl_coef": 0.1, "kl_estimator": "k3", "whiten_rewards": whiten_rewards}
    got, eager = run(data, **options), reference.rollout_advantages(**data, **options)
    exact = reference.rollout_advantages(**double(data), **options)
    for name in got._fields:
        check_error(name, getattr(got, name), getattr(eager, name), getattr(exact, name))


def test_whitening_keeps_a_small_spread_around_a_large_mean(small_tiles):
    """Sums of squares in float32 would lose a standard deviation of 1 at a mean of 4096 completely."""
    b, t = 4, 100
    rewards = 4096 + torch.randn(b, t, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    zeros, mask = torch.zeros(b, t), torch.ones(b, t, dtype=torch.bool)
    # With γ = 0 and V = 0 the advantage is the reward, which is -kl_coef * (logprobs - 0).
    data = {"scores": torch.zeros(b), "logprobs": rewards, "ref_logprobs": zeros, "values": zeros, "mask": mask}
    got = run(data, kl_coef=-1.0, gamma=0.0)
    check_error(
        "advantages",
        got.advantages,
        reference.masked_whiten(rewards, mask),
        reference.masked_whiten(rewards.double(), mask),
    )


def test_actions_with_a_zero_advantage_count(small_tiles):
    """Half the advantages are exactly 0, like those of masked tokens, but must enter the statistics."""
    logprobs = (torch.arange(40) % 2).float().view(2, 20)
    zeros, mask = torch.zeros(2, 20), torch.arange(20).expand(2, 20) < 15
    data = {"scores": torch.zeros(2), "logprobs": logprobs, "ref_logprobs": zeros, "values": zeros, "mask": mask}
    got = run(data, kl_coef=-1.0, gamma=0.0)
    torch.testing.assert_close(got.advantages, reference.masked_whiten(logprobs, mask))


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_of_nothing_and_of_one_token(small_tiles, count):
    """A variance over n - 1 = 0 or -1 counts as 0."""
    mask = torch.arange(4)[None] < count
    x = torch.ones(1, 4)
    data = {"scores": torch.ones(1), "logprobs": x, "ref_logprobs": x, "values": x, "mask": mask}
    got = run(data, kl_coef=0.1, whiten_rewards=True)
    assert got.advantages.tolist() == [[0.0] * 4]
    assert got.rewards.tolist() == [[float(count), 0.0, 0.0, 0.0]]
    assert torch.isfinite(got.returns).all()


@pytest.mark.parametrize("mask", MASKS)
def test_packed_gives_the_bits_of_padded(small_tiles, mask):
    b, t = 6, 50
    lengths = torch.tensor([0, 1, t, 17, 0, 48])
    inside = torch.arange(t) < lengths[:, None]
    data = rollout(b, t, mask)
    data["mask"] = data["mask"] & inside
    tokens = {k: v if k == "scores" else v[inside] for k, v in data.items()}
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    for score_index in (None, torch.tensor([0, 0, 33, 3, 0, 47])):
        options = {"kl_coef": 0.2, "whiten_rewards": score_index is None, "score_index": score_index}
        padded, packed = run(data, **options), run(tokens, **options, cu_seqlens=cu)
        for x, y in zip(packed, padded, strict=True):
            assert torch.equal(x, y[inside])
            assert not y[~inside].any()
        eager = reference.rollout_advantages(**tokens, **options, cu_seqlens=cu)
        exact = reference.rollout_advantages(**double(tokens), **options, cu_seqlens=cu)
        check_error("advantages", packed.advantages, eager.advantages, exact.advantages)


def test_bits_do_not_depend_on_other_rows_or_repetition(small_tiles):
    data = rollout(4, 45, "holes")
    options = {"kl_coef": 0.2, "kl_estimator": "k3"}
    whole = run(data, **options, whiten_rewards=True)
    assert all(map(torch.equal, whole, run(data, **options, whiten_rewards=True)))
    one = {k: v[2:3] for k, v in data.items()}
    whole, alone = (run(x, **options, whiten_advantages=False) for x in (data, one))
    assert all(torch.equal(x[2:3], y) for x, y in zip(whole, alone, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strides(small_tiles, dtype):
    data = rollout(4, 40, "holes")
    narrow = {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}
    wide = {k: v.float() if v.is_floating_point() else v for k, v in narrow.items()}
    turned = {k: v.T.contiguous().T if v.dim() == 2 else v for k, v in narrow.items()}
    expected = run(wide, kl_coef=0.1)
    assert all(x.dtype == torch.float32 for x in expected)
    assert all(map(torch.equal, run(narrow, kl_coef=0.1), expected))
    assert all(map(torch.equal, run(turned, kl_coef=0.1), expected))


@pytest.mark.parametrize(("b", "t"), [(0, 5), (3, 0), (0, 0)])
def test_empty(b, t):
    x = torch.zeros(b, t)
    data = {"scores": torch.zeros(b), "logprobs": x, "ref_logprobs": x, "values": x, "mask": x.bool()}
    assert all(y.shape == (b, t) for y in run(data, kl_coef=0.1, whiten_rewards=True))


def test_integer_options_equal_float_options(small_tiles):
    """Integers reach the launcher as integers, because no dispatcher converts them to floats."""
    data = rollout(2, 20, "holes")
    whole, expected = run(data, kl_coef=1, gamma=1, lam=0), run(data, kl_coef=1.0, gamma=1.0, lam=0.0)
    assert all(map(torch.equal, whole, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_long_rows_and_graph_capture(whiten_rewards):
    data = rollout(3, 70_000, "response with a hole")
    options = {"kl_coef": 0.1, "kl_estimator": "k3", "whiten_rewards": whiten_rewards, "gamma": 0.99}
    got, eager = run(data, **options), reference.rollout_advantages(**data, **options)
    exact = reference.rollout_advantages(**double(data), **options)
    for name in got._fields:
        check_error(name, getattr(got, name), getattr(eager, name), getattr(exact, name))
    data, graph = to_device(data), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rollout_advantages(**data, **options, backend="triton")
    graph.replay()
    assert all(torch.equal(x, y.to(DEVICE)) for x, y in zip(captured, got, strict=True))
