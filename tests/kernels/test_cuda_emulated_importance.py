"""Tests of the results of the CUDA C++ kernels of `importance_weights`, run on the host by an emulator."""

import itertools
import math

import pytest
import torch

from rlhf_kernels import _cuda, reference
from rlhf_kernels.launch_args import Sequences
from rlhf_kernels.token_args import (
    IMPORTANCE_ACTIONS,
    IMPORTANCE_LEVELS,
    IMPORTANCE_METRICS,
    IMPORTANCE_STATISTICS,
    ImportanceWeights,
)

from . import cuda_emulator
from .helpers.bounds import check_error
from .helpers.selections import LEVELS, RULES, batch, packed


@pytest.fixture(autouse=True)
def emulated():
    with cuda_emulator.emulated():
        yield


def weigh(
    logprobs, sampler_logprobs, mask, *, level="token", action="truncate", metric="ratio", low=None, high=None,
    advantages=None, cu_seqlens=None,
):  # fmt: skip
    weights, kept, metrics = _cuda.importance_weights(
        logprobs, sampler_logprobs, mask, advantages, Sequences.of(logprobs, cu_seqlens),
        IMPORTANCE_LEVELS.index(level), IMPORTANCE_ACTIONS.index(action), IMPORTANCE_STATISTICS.index(metric),
        -math.inf if low is None else low, math.inf if high is None else high,
    )  # fmt: skip
    return ImportanceWeights(weights, kept, dict(zip(IMPORTANCE_METRICS, metrics.unbind(), strict=True)))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("b", "t"), [(1, 1), (5, 40), (2, 1500)])
def test_against_float64(level, rule, b, t):
    data = batch(b, t, seed=t)
    bounds = {name: bound for name, bound in rule.items() if bound is not None}
    got = weigh(**data, level=level, **bounds)
    eager = reference.importance_weights(**data, level=level, **bounds)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in data.items()}
    exact = reference.importance_weights(**wide, level=level, **bounds)
    assert torch.equal(got.mask, exact.mask)
    check_error("weights", got.weights, eager.weights, exact.weights)
    for name in IMPORTANCE_METRICS:
        assert float(got.metrics[name]) == pytest.approx(float(exact.metrics[name]), rel=2e-5, abs=2e-6), name
    again = weigh(**data, level=level, **bounds)
    assert torch.equal(again.weights, got.weights) and all(
        map(torch.equal, again.metrics.values(), got.metrics.values())
    )


@pytest.mark.parametrize("level", LEVELS)
def test_packed_gives_the_bits_of_padded(level):
    lengths, data = torch.tensor([0, 1, 300, 17, 0, 23]), batch(6, 300)
    inside = torch.arange(300) < lengths[:, None]
    data["mask"] = data["mask"] & inside
    rule = {"action": "mask", "low": 0.9, "high": 1.1, "level": level}
    padded, (tokens, ends) = weigh(**data, **rule), packed(data, lengths)
    got = weigh(**tokens, **rule, cu_seqlens=ends)
    assert torch.equal(got.weights, padded.weights[inside]) and torch.equal(got.mask, padded.mask[inside])


def test_rejection_by_the_sign_of_the_advantage():
    data = batch(9, 30)
    advantages = torch.randn(9, 30, generator=torch.Generator().manual_seed(3))
    rule = {"level": "geometric", "action": "mask", "metric": "k1", "high": 0.01, "advantages": advantages}
    expected = reference.importance_weights(**data, **rule)
    got = weigh(**data, **rule)
    assert torch.equal(got.mask, expected.mask) and 0 < expected.mask.sum() < data["mask"].sum()
    for name in ("rejected_share", "above_share"):
        torch.testing.assert_close(got.metrics[name], expected.metrics[name])


@pytest.mark.parametrize("level", LEVELS)
def test_nonfinite_log_probs_and_empty_batches(level):
    logprobs, mask = torch.tensor([[math.nan], [0.0], [-math.inf]]), torch.ones(3, 1, dtype=torch.bool)
    got = weigh(logprobs, torch.zeros(3, 1), mask, level=level, high=2.0)
    assert got.weights.flatten().tolist() == pytest.approx([math.nan, 1, math.exp(-20)], nan_ok=True)
    assert all(got.metrics[name].isnan() for name in ("weight_max", "weight_mean", "mismatch_kl", "mismatch_max"))
    for shape in ((0, 3), (3, 0), (2, 3)):
        got = weigh(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), level=level)
        assert not got.weights.any() and not got.mask.any() and not any(got.metrics.values())


@pytest.mark.parametrize("ends", [[0, 8], [-9, 4, 4], [2, 1 << 30], [3, 1, 2, -4]])
def test_invalid_cu_seqlens_read_nothing_out_of_bounds(ends):
    x = torch.full((2000,), torch.nan)
    x[:4] = 0.5
    ends = torch.tensor(ends, dtype=torch.int32)
    got = weigh(x[:4], x[:4], torch.ones(2000, dtype=torch.bool)[:4], level="sequence", cu_seqlens=ends)
    inside = torch.zeros(4, dtype=torch.bool)
    for begin, end in itertools.pairwise(ends.clamp(0, 4).cummax(0).values.tolist()):
        inside[begin:end] = True
    assert got.weights[inside].isfinite().all() and got.weights[~inside].isnan().all()
