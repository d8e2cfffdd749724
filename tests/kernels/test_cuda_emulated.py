"""Tests of the results of the CUDA C++ kernels of `gae` and `rollout_advantages`, run on the host by an emulator."""

import itertools

import pytest
import torch

from rlhf_kernels import _cuda, reference
from rlhf_kernels._options import KL_ESTIMATORS

from . import cuda_emulator
from .helpers.advantages import INF, MASKS, batch, double, rollout
from .helpers.bounds import check_error

TILE = 4096  # tokens (csrc/cuda/ops.h)


@pytest.fixture(autouse=True)
def emulated():
    with cuda_emulator.emulated():
        yield


def run_gae(rewards, values, mask, gamma=1.0, lam=0.95, bootstrap=None, holes="skip", cu_seqlens=None):
    return _cuda.gae(rewards, values, mask, gamma, lam, bootstrap, holes == "skip", cu_seqlens)


def check_gae(rewards, values, m, **options):
    got = run_gae(rewards, values, m, **options)
    eager = reference.gae(rewards, values, m, **options)
    wide = options | {"bootstrap": None if options.get("bootstrap") is None else options["bootstrap"].double()}
    exact = reference.gae(rewards.double(), values.double(), m, **wide)
    for x, name in zip(got, exact._fields, strict=True):
        check_error(name, x, getattr(eager, name), getattr(exact, name))
    return got


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize(("b", "t"), [(1, 1), (5, 33), (6, 300), (2, 700)])
def test_gae(mask, holes, b, t):
    rewards, values, m = batch(b, t, mask)
    discounts = ((1.0, 0.95), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)) if t < 100 else ((0.99, 0.95),)
    for (gamma, lam), bootstrap in itertools.product(discounts, (None, torch.arange(b) - 1.5)):
        check_gae(rewards, values, m, gamma=gamma, lam=lam, holes=holes, bootstrap=bootstrap)


def every_mask(b, t):
    """Return the batches of all masks as one: the reference takes one step per position, however many sequences there are."""
    return map(torch.cat, zip(*(batch(b, t, mask) for mask in MASKS), strict=True))


@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_in_tiles(holes, bootstrap):
    """Long sequences take three launches: reduce the tiles, carry the states, write."""
    bootstrap = torch.tensor([3.0, -2.0]).repeat(len(MASKS)) if bootstrap else None
    check_gae(*every_mask(2, 2 * TILE + 5), gamma=0.999, lam=0.99, holes=holes, bootstrap=bootstrap)


@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize("t", [33, 700, 2 * TILE + 5])
def test_lambda_per_sequence(holes, t):
    rewards, values, m = batch(3, t, "holes")
    lam, bootstrap = torch.tensor([0.95, 0.0, 1.0]), torch.tensor([3.0, -2.0, 1.0])
    got = check_gae(rewards, values, m, gamma=0.999, lam=lam, holes=holes, bootstrap=bootstrap)
    for i in range(3) if t < TILE else ():  # a batch of one long sequence has other tiles
        row = slice(i, i + 1)
        one = run_gae(rewards[row], values[row], m[row], 0.999, lam[i].item(), bootstrap[row], holes)
        assert all(torch.equal(x[row], y) for x, y in zip(got, one, strict=True))


@pytest.mark.parametrize("ends", [[0, 8], [-9, 4, 4], [2, 1 << 30], [3, 1, 2, -4], [0, 9 * TILE, 3 * TILE]])
@pytest.mark.parametrize("tokens", [4, 2 * TILE + 4])
def test_invalid_cu_seqlens_read_nothing_out_of_bounds(ends, tokens):
    """The host does not check `cu_seqlens` on a device, yet no kernel may read past the tokens."""
    x = torch.full((tokens + 2000,), torch.nan)
    x[:tokens] = 0.5
    mask, ends = torch.ones(len(x), dtype=torch.bool), torch.tensor(ends, dtype=torch.int32)
    given = x[:tokens], x[:tokens], mask[:tokens]
    scores, flags = torch.zeros(len(ends) - 1), (0.1, 0, 1.0, 0.95, torch.inf, None, None, True, True, True)
    results = (*run_gae(*given, cu_seqlens=ends), *_cuda.rollout_advantages(scores, x[:tokens], *given, *flags, ends))
    inside = torch.zeros(tokens, dtype=torch.bool)
    for begin, end in itertools.pairwise(ends.clamp(0, tokens).cummax(0).values.tolist()):
        inside[begin:end] = True
    assert all(y.shape == (tokens,) and y[inside].isfinite().all() for y in results)


@pytest.mark.parametrize("holes", ["skip", "zero"])
def test_one_block_processes_all_tiles_of_a_long_sequence(holes):
    """Among many short sequences, a long one takes no separate launches for its tiles."""
    lengths = torch.tensor([3, TILE + 77, 0, *[9] * 20])
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    n = int(cu[-1])
    rewards, values, m = (x[0] for x in batch(1, n, "holes"))
    got = check_gae(rewards, values, m, lam=0.99, holes=holes, bootstrap=torch.arange(len(lengths)) / 4, cu_seqlens=cu)
    assert all(map(torch.equal, got, run_gae(rewards, values, m, 1.0, 0.99, torch.arange(len(lengths)) / 4, holes, cu)))


@pytest.mark.parametrize("holes", ["skip", "zero"])
@pytest.mark.parametrize("lengths", [[0, 1, 130, 17, 0, 129], [TILE + 3, 0, 2 * TILE, TILE + 1]])
def test_packed_gives_the_bits_of_padded(holes, lengths):
    b, t = len(lengths), max(lengths)
    lengths = torch.tensor(lengths)
    rewards, values, m = batch(b, t, "holes")
    inside = torch.arange(t) < lengths[:, None]
    m = m & inside
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    options = {"bootstrap": torch.arange(b) / 4, "holes": holes}
    padded = run_gae(rewards, values, m, **options)
    packed = check_gae(rewards[inside], values[inside], m[inside], **options, cu_seqlens=cu)
    for x, y in zip(packed, padded, strict=True):
        assert torch.equal(x, y[inside])


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_gae_of_unaligned_memory(shift):
    rewards, values, m = batch(3, 40, "holes")

    def moved(x):
        return torch.empty(x.numel() + shift, dtype=x.dtype)[shift:].view(x.shape).copy_(x)

    got = run_gae(moved(rewards), moved(values), moved(m))
    assert all(map(torch.equal, got, run_gae(rewards, values, m)))


@pytest.mark.parametrize(("b", "t"), [(0, 5), (3, 0), (0, 0)])
def test_empty(b, t):
    x = torch.zeros(b, t)
    assert run_gae(x, x, x.bool())[0].shape == (b, t)
    assert run_rollout(torch.zeros(b), x, x, x, x.bool(), kl_coef=0.1, whiten_rewards=True)[0].shape == (b, t)


def run_rollout(
    scores, logprobs, ref_logprobs, values, mask, *, kl_coef, kl_estimator="k1", gamma=1.0, lam=0.95, score_clip=None,
    score_index=None, bootstrap=None, holes="skip", whiten_rewards=False, whiten_advantages=True, cu_seqlens=None,
):  # fmt: skip
    return _cuda.rollout_advantages(
        scores, logprobs, ref_logprobs, values, mask, kl_coef, KL_ESTIMATORS.index(kl_estimator), gamma, lam,
        INF if score_clip is None else score_clip, score_index, bootstrap, holes == "skip", whiten_rewards,
        whiten_advantages, cu_seqlens,
    )  # fmt: skip


def check_rollout(data, **options):
    got = run_rollout(**data, **options)
    eager = reference.rollout_advantages(**data, **options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    exact = reference.rollout_advantages(**double(data), **wide)
    for x, name in zip(got, exact._fields, strict=True):
        check_error(name, x, getattr(eager, name), getattr(exact, name))
    return got


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("b", "t", "kl_estimator"),
    [(1, 1, "k1"), (3, 17, "k1"), (3, 17, "k2"), (3, 17, "k3"), (3, 17, "abs"), (2, 600, "k3")],
)
def test_rollout(mask, b, t, kl_estimator):
    data = rollout(b, t, mask) | {"scores": torch.linspace(-3, 3, b)}
    for holes, rewards, advantages in itertools.product(("skip", "zero"), (False, True), (False, True)):
        check_rollout(
            data, kl_coef=0.1, kl_estimator=kl_estimator, gamma=0.99, holes=holes, score_clip=1.5,
            whiten_rewards=rewards, whiten_advantages=advantages, bootstrap=torch.arange(b) / 2,
        )  # fmt: skip


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_rollout_in_tiles(whiten_rewards):
    batches = [rollout(2, 2 * TILE + 3, mask) for mask in MASKS]
    data = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
    bootstrap = torch.tensor([1.0, -1.0]).repeat(len(MASKS))
    check_rollout(data, kl_coef=0.1, holes="zero", whiten_rewards=whiten_rewards, bootstrap=bootstrap)


@pytest.mark.parametrize("t", [33, 2 * TILE + 3])
def test_rollout_with_lambda_per_sequence(t):
    check_rollout(
        rollout(3, t, "holes"), kl_coef=0.1, gamma=0.99, lam=torch.tensor([0.95, 0.0, 1.0]), whiten_rewards=True
    )


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("score_index", [None, [0, 0, 999, 3, 0, 700]])
def test_packed_rollout(whiten_rewards, score_index):
    """The score is added at the last action, or at `score_index`, which may be masked or out of range."""
    b, t = 6, 1000
    lengths = torch.tensor([0, 1, t, 17, 0, 801])
    inside = torch.arange(t) < lengths[:, None]
    data = rollout(b, t, "holes")
    data["mask"] = data["mask"] & inside
    options = {"kl_coef": 0.2, "whiten_rewards": whiten_rewards}
    options["score_index"] = None if score_index is None else torch.tensor(score_index)
    padded = run_rollout(**data, **options)
    tokens = {k: v if k == "scores" else v[inside] for k, v in data.items()}
    cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    packed = check_rollout(tokens, **options, cu_seqlens=cu)
    for x, y in zip(packed, padded, strict=True):
        torch.testing.assert_close(x, y[inside], rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, packed, run_rollout(**tokens, **options, cu_seqlens=cu)))


def test_many_sequences_fold_their_sums():
    """With more than 2048 sequences, a separate launch adds up their partial sums before the whitening launch."""
    check_rollout(rollout(2100, 3, "holes"), kl_coef=0.1)


def test_whitened_rewards_of_sequences_shorter_than_a_lane():
    """The four tokens of one lane belong to two or three sequences, each with its score."""
    check_rollout(rollout(50, 3, "holes"), kl_coef=0.1, whiten_rewards=True)
    cu = torch.tensor([0, 1, 1, 3, 4, 4, 9], dtype=torch.int32)
    tokens = {k: v if k == "scores" else v[0] for k, v in rollout(1, 9, "all").items()}
    check_rollout(tokens | {"scores": torch.arange(6) - 2.5}, kl_coef=0.1, whiten_rewards=True, cu_seqlens=cu)


def test_a_score_index_out_of_range_adds_no_score():
    data = rollout(2, 9, "all")
    index = torch.tensor([9, -1])
    got = run_rollout(**data, kl_coef=0.0, score_index=index)
    assert got[2].abs().max() == 0
